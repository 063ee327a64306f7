"""The plan that the command prints before a record: resources, batch arithmetic and sizes."""

from __future__ import annotations

import torch
from rich.console import Console

from hedgemix.config import Recipe
from hedgemix.model.linear import Linear
from hedgemix.model.transformer import Model, parameter_count


def print_plan(recipe: Recipe, seeds: tuple[int, ...], console: Console) -> None:
    """Print the resources, batch arithmetic and sizes of a record, from the same configuration that will run it."""
    for name, value in plan_lines(recipe, seeds).items():
        console.print(f"{name:14} {value}", markup=False, soft_wrap=True)


def plan_lines(recipe: Recipe, seeds: tuple[int, ...]) -> dict[str, str]:
    """Describe the record in lines, by their headings; builds the model without weights to count its parameters."""
    compute, train, evaluate, limits = recipe.compute, recipe.train, recipe.evaluate, recipe.limits
    with torch.device("meta"):
        model = Model(recipe.model, recipe.data.vocab_size, train.sequence_tokens)
    sequences = train.batch_tokens // train.sequence_tokens
    shortest = train.sequence_tokens >> len(train.growth_fractions)
    grow = f", which grow from {shortest:,}" if train.growth_fractions else ""
    share = sequences // compute.workers
    pieces = -(-share // train.microbatch_sequences)
    cpus = f"{compute.workers * compute.cpus_per_worker:g}" if compute.cpus_per_worker else "all"
    loop = f"{train.budget_seconds - train.reserve_seconds:g} s, then {train.reserve_seconds:g} s for EMA, calibration"
    return {
        "seeds": ", ".join(map(str, seeds)),
        "parameters": f"{parameter_count(model):,}",
        "operations": operations_line(recipe, model),
        "training job": f"{compute.workers} workers on one node: {compute.workers * compute.gpus_per_worker:g} GPU, "
        f"{cpus} CPU",
        "training loop": f"{train.steps} steps" if train.steps else loop,
        "step": f"{train.batch_tokens:,} tokens = {sequences} sequences of {train.sequence_tokens:,}{grow}",
        "each worker": f"{share * train.sequence_tokens:,} tokens a step = {share} sequences in "
        f"{pieces} microbatch{'es' if pieces > 1 else ''}",
        "evaluation": f"{compute.evaluate_workers} ranks, {evaluate.order}, context {evaluate.window_tokens:,}, "
        f"chunks of {evaluate.chunk_tokens:,} tokens",
        "limits": f"{limits.total_bytes:,} bytes, {limits.train_seconds:g} s training, "
        f"{limits.evaluate_seconds:g} s evaluation",
    }


def operations_line(recipe: Recipe, model: Model) -> str:
    """Describe the work of training on a token, before and after its loop of layers begins."""
    loop, fraction = recipe.model.looped_layers, recipe.train.loop_from_fraction
    line = f"{matrix_operations(model, False) / 1e6:,.1f} million a token in training, of matrices"
    if not loop:
        return line
    after = f"{matrix_operations(model, True) / 1e6:,.1f} million"
    names = f"layer {loop[0]} runs" if len(loop) == 1 else f"layers {loop[0]} to {loop[-1]} run"
    return f"{line}; {after} from {fraction:.0%} of the run on, when {names} {recipe.model.loop_passes} times"


def matrix_operations(model: Model, looped: bool) -> int:
    """Count the floating-point operations of a token's products with matrices and output layer, forward and, twice
    that, backward. looped: with the loop of layers."""
    weights = [sum(m.weight.numel() for m in block.modules() if isinstance(m, Linear)) for block in model.blocks]
    matrices = sum(m.weight.numel() for m in model.modules() if isinstance(m, Linear))
    passes = sum(weights[layer] for layer in model.config.passes(looped))
    return 6 * (matrices - sum(weights) + passes + model.embedding.weight.numel())
