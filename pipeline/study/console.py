"""What the command prints and writes at the end of a study."""

from __future__ import annotations

from rich.console import Console

from pipeline.storage.store import Storage


def show_study(storage: Storage, name: str, report: bool, console: Console) -> None:
    """Print a line a variant, those of earlier starts too, and what was found; with `report` write it as a page. What
    goes wrong with the page fails nothing."""
    from pipeline.analysis import study, study_table, verdicts  # scipy takes a second to import

    loaded = study.load_named(storage, name)
    found = verdicts.findings(loaded)
    study_table.show(loaded, found, console)
    console.print(f"tables: {storage.where(storage.root / f'{name}*.parquet')}", markup=False, soft_wrap=True)
    console.print(f"study:  {storage.where(loaded.folder / study.STUDY)}", markup=False, soft_wrap=True)
    if report:
        from pipeline.report import study_page  # and matplotlib another

        try:
            path = study_page.write(loaded, found)
            console.print(f"report: {storage.where(path)}", markup=False, soft_wrap=True)
        except Exception as error:
            console.print(f"no report: {type(error).__name__}: {error}", markup=False, soft_wrap=True)
