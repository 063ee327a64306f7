"""The plan that the command prints before a record: resources, batch arithmetic, sizes, bytes and seconds."""

from __future__ import annotations

from rich.console import Console

from hedgemix.config import Recipe
from hedgemix.model.linear import Linear
from hedgemix.model.transformer import Model, parameter_count
from hedgemix.quantize.fit_to_size import MOST_TRIES
from pipeline.forecast import artifact_bytes, gpu_plan


def print_plan(recipe: Recipe, seeds: tuple[int, ...], console: Console) -> None:
    """Print what a record will ask for and take, from the same configuration that will run it."""
    for name, value in plan_lines(recipe, seeds).items():
        console.print(f"{name:14} {value}", markup=False, soft_wrap=True)


def plan_lines(recipe: Recipe, seeds: tuple[int, ...]) -> dict[str, str]:
    """Describe the record in lines, by their headings."""
    compute, train, evaluate, limits = recipe.compute, recipe.train, recipe.evaluate, recipe.limits
    model = gpu_plan.built(recipe)
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
        "bytes": bytes_line(recipe, model),
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
        **seconds_lines(recipe),
    }


def bytes_line(recipe: Recipe, model: Model) -> str:
    """Describe how the limit is shared out, and between which bytes artifact and script should lie."""
    shares, loss, limit = artifact_bytes.share_out(recipe, model), recipe.quantize.loss_nats, recipe.limits.total_bytes
    if recipe.quantize.method == "reference":
        return f"not computed of the published export; script {shares.script:,} of {limit:,}"
    low, high = (f"{bound:,}" for bound in shares.expected(loss))
    least, most = artifact_bytes.needed_bits(loss)
    about = "" if shares.known_tokenizer else "about "
    return (
        f"{low if low == high else f'{low} to {high}'} of {limit:,}, computed: script {shares.script:,}, tokenizer "
        f"{about}{shares.tokenizer:,}, memory {shares.memory:,}, scales and steps about {shares.rest:,}; "
        f"{shares.bits:.2f} bits are left for each of {shares.weights:,} weights, and measured models needed "
        f"{least:.1f} to {most:.1f} for quantize.loss_nats {loss:g}"
    )


def seconds_lines(recipe: Recipe) -> dict[str, str]:
    """Describe the seconds of training, export and evaluation: on GPUs computed, on CPUs where a clock sets them."""
    train, world = recipe.train, recipe.compute.workers
    if not recipe.compute.gpus_per_worker:
        told = "what its steps take" if train.steps else f"{train.budget_seconds:g}, by the clock"
        return {"train seconds": f"{told}; a CPU's rates are not assumed, so no others are computed"}
    rates = gpu_plan.Rates()
    *steps, calibration = gpu_plan.training(recipe, rates)
    each = ", then ".join(f"{1000 * step.seconds:.1f} ms" for step in steps)
    quantization, coding = (stage.seconds for stage in gpu_plan.export(recipe, rates))
    count = f"{train.steps:,} steps" if train.steps else steps[-1].what
    return {
        "train seconds": f"a step {each}: {count}; calibration {calibration.seconds:.1f}",
        "export seconds": f"quantization {quantization:.1f} and coding {coding:.1f} a try, of at most {MOST_TRIES}",
        "score seconds": evaluation_line(recipe, rates),
        "computed": f"not measured: for {world} x {gpu_plan.DEVICE}, by the rates of pipeline/forecast/gpu_plan.py",
    }


def evaluation_line(recipe: Recipe, rates: gpu_plan.Rates) -> str:
    """Describe the seconds of an evaluation's stages, where its text's length and its launches are known."""
    data, counted = recipe.data, gpu_plan.launches_of(recipe.evaluate)
    tokens = gpu_plan.TOKENS_OF_SHARDS.get(data.vocab_size) if data.source == "shards" else None
    if tokens is None or counted is None:
        unknown = "how long the validation text is" if tokens is None else "how many launches these settings take"
        return f"not computed: {unknown} is not known"
    tokens = min(tokens, data.max_valid_tokens or tokens)
    index, *stages = gpu_plan.evaluation(recipe, rates, counted, tokens)
    each = ", ".join(f"{stage.name} {stage.seconds:.0f}" for stage in stages)
    return (
        f"{gpu_plan.evaluation_seconds(stages):.0f} of {tokens:,} tokens: {each}; before them, n-gram index "
        f"{index.seconds:.0f}"
    )


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
