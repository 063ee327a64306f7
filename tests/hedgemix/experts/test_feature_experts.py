import contextlib
import copy
import itertools
from dataclasses import replace

import numpy as np
import pytest
import torch

from hedgemix.config import CacheConfig, EvaluateConfig, HeadConfig, TTTConfig
from hedgemix.experts import fast_head, feature_experts, feature_metric, neural_cache
from hedgemix.experts.feature_experts import CACHE, HEAD, FeatureExperts

VOCAB, WIDTH, COUNT = 11, 8, 150
CONFIG = EvaluateConfig(
    cache=CacheConfig(memory_tokens=20, theta=3.0, decay_tokens=15.0, floor=0.05, ridge=2.0),
    ttt=TTTConfig(kind="head", head=HeadConfig(rate=0.5, memory_tokens=30.0, block_tokens=8, ridge=0.1)),
)


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    """Many refreshes, blocks and moves within a short text."""
    monkeypatch.setattr(feature_metric, "FIRST_TOKENS", 16)
    monkeypatch.setattr(neural_cache, "BLOCK_TOKENS", {"cpu": 8})
    monkeypatch.setattr(neural_cache, "STEP_TOKENS", 32)
    monkeypatch.setattr(fast_head, "SPAN_TOKENS", 16)


@pytest.fixture
def text():
    """Log rows (N - 1, V) and features (N - 1, D) of positions 1 .. N - 1, and their tokens."""
    random = torch.Generator().manual_seed(3)
    features = torch.randn(COUNT, WIDTH, generator=random) * torch.linspace(0.2, 3, WIDTH) + 1
    tokens = torch.randint(VOCAB, (COUNT,), generator=random)
    return torch.randn(COUNT, VOCAB, generator=random).log_softmax(1), features, tokens


def run(text, cuts=(), config=CONFIG):
    experts, edges = FeatureExperts(config, VOCAB, WIDTH), [0, *cuts, len(text[0])]
    parts = [experts.rows(*(each[left:right] for each in text)) for left, right in itertools.pairwise(edges)]
    return {name: torch.cat([part[name] for part in parts]) for name in experts.names}


def whitener(features, position, ridge):
    """Of the position's row: from the positions before the last power of two from 16 on."""
    learned = 1
    while max(16, 2 * learned) <= position:
        learned = max(16, 2 * learned)
    moments = 256 * np.eye(WIDTH)
    for feature in features[: learned - 1]:
        moments += np.outer(feature, feature)
    values, vectors = np.linalg.eigh(moments / (256 + learned - 1))
    return vectors @ np.diag((values + ridge * values.mean()) ** -0.5) @ vectors.T


def slow_cache(text, config):
    _, features, tokens = (each.double().numpy() for each in text)
    rows = [np.full(VOCAB, 1 / VOCAB)]
    for t in range(2, COUNT + 1):  # position t has row t - 1
        metric, row = whitener(features, t, config.ridge), np.zeros(VOCAB)
        for i in range(max(1, t - config.memory_tokens), t):
            a, b = metric @ features[t - 1], metric @ features[i - 1]
            cosine = a @ b / np.linalg.norm(a) / np.linalg.norm(b)
            row[int(tokens[i - 1])] += np.exp(config.theta * cosine - (t - i) / config.decay_tokens)
        rows.append((1 - config.floor) * row / row.sum() + config.floor / VOCAB)
    return np.array(rows)


def softmax(logits):
    return np.exp(logits) / np.exp(logits).sum()


def slow_head(text, config):
    log_rows, features, tokens = (each.double().numpy() for each in text)
    steps = []  # of earlier blocks: position, key, error
    block, rows = [], []  # of this one: position, key, and the error as each pass sees it
    for t in range(1, COUNT + 1):
        if t % config.block_tokens == 0:
            steps += [(i, key, errors[-1]) for i, key, errors in block]
            block = []
        metric, feature = whitener(features, t, config.ridge), features[t - 1]
        length = np.linalg.norm(metric @ feature)
        key, query = feature / length, metric @ metric @ feature / length

        def attention(i, other, query=query, t=t):
            return config.rate * (query @ other) * np.exp((i - t) / config.memory_tokens)

        base = log_rows[t - 1] + sum((attention(i, other) * error for i, other, error in steps), np.zeros(VOCAB))
        logits, errors, occurred = base, [], np.eye(VOCAB)[int(tokens[t - 1])]
        for number in range(2):
            errors.append(occurred - softmax(logits))
            logits = base + sum((attention(i, other) * of[number] for i, other, of in block), np.zeros(VOCAB))
        rows.append(softmax(logits))
        block.append((t, key, [*errors, occurred - rows[-1]]))
    return np.array(rows)


def test_rows_are_those_of_the_obvious_loops(text):
    rows = run(text)
    assert np.abs(rows[CACHE].numpy() - slow_cache(text, CONFIG.cache)).max() < 2e-6
    assert np.abs(rows[HEAD].numpy() - slow_head(text, CONFIG.ttt.head)).max() < 2e-6
    # ... and both differ from what would be there without them.
    assert (rows[HEAD] - text[0].exp()).abs().max() > 0.05 and rows[CACHE].max() > 0.2


def test_each_may_be_alone_and_says_the_same(text):
    both = run(text)
    alone = {CACHE: replace(CONFIG, ttt=replace(CONFIG.ttt, enabled=False))}
    alone[HEAD] = replace(CONFIG, cache=replace(CONFIG.cache, enabled=False))
    for name, config in alone.items():
        assert feature_experts.names(config) == (name,)
        assert torch.equal(run(text, config=config)[name], both[name])


def test_rows_are_distributions_wherever_the_model_is_sure():
    surely = torch.full((COUNT, VOCAB), -1000.0)
    surely[:, 0] = 0
    features, tokens = torch.randn(COUNT, WIDTH), torch.arange(COUNT) % VOCAB
    for rows in run((surely, features, tokens)).values():
        assert rows.min() > 0 and (rows.double().sum(1) - 1).abs().max() < 1e-6


@pytest.mark.parametrize("cut", [1, 2, 15, 16, 17, 40, 63, 64, 100, COUNT - 1])
def test_no_row_knows_its_token_or_any_later_one(text, cut):
    """Bitwise: row `cut` is made before token `cut`, and before the features that follow from it."""
    log_rows, features, tokens = (each.clone() for each in text)
    tokens[cut:] = (tokens[cut:] + 1) % VOCAB
    log_rows[cut + 1 :], features[cut + 1 :] = log_rows[cut + 1 :].flip(1), -3 * features[cut + 1 :]
    before, after = run(text), run((log_rows, features, tokens))
    for name, rows in before.items():
        assert torch.equal(rows[: cut + 1], after[name][: cut + 1])
        assert cut + 1 == COUNT or not torch.equal(rows[cut + 1], after[name][cut + 1])


def test_no_cut_changes_a_row(text):
    whole = run(text)
    at_blocks = run(text, cuts=[7, 15, 31, 39, 79])  # position t has row t - 1
    anywhere = run(text, cuts=[1, 2, 6, 21, 22, 50, 51, 93])
    for name, rows in whole.items():
        assert torch.equal(rows, at_blocks[name])
        assert (rows - anywhere[name]).abs().max() < 1e-6


def test_one_token_at_a_time_gives_the_same_rows(text):
    whole, experts = run(text), FeatureExperts(CONFIG, VOCAB, WIDTH)
    for i, (log_row, feature, token) in enumerate(zip(*text, strict=True)):
        said, again = experts.predict(log_row, feature), experts.predict(log_row, feature)
        for name, rows in whole.items():
            assert torch.equal(said[name], again[name])
            assert (said[name] - rows[i]).abs().max() < 1e-6
        experts.update(int(token))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_token_at_a_time_gives_the_bits_of_spans_of_one(text, dtype):
    log_rows, features, tokens = text
    spans, experts = FeatureExperts(CONFIG, VOCAB, WIDTH), FeatureExperts(CONFIG, VOCAB, WIDTH)
    for i, token in enumerate(tokens.tolist()):
        feature = features[i].to(dtype)
        said = experts.predict(log_rows[i], feature)
        experts.update(token)
        for name, rows in spans.rows(log_rows[i : i + 1], feature[None], tokens[i : i + 1]).items():
            assert torch.equal(said[name], rows[0])


@pytest.mark.parametrize("stop", [0, 3, 15, 20, 63, 100])
def test_what_was_saved_goes_on_to_the_same_bits(text, stop):
    """Also from a copy: what goes on later moves nothing that was saved."""
    whole = run(text, cuts=[stop] if stop else [])
    first, second = FeatureExperts(CONFIG, VOCAB, WIDTH), FeatureExperts(CONFIG, VOCAB, WIDTH)
    before, after = ([each[:stop] for each in text], [each[stop:] for each in text])
    if stop:
        first.rows(*before)
    saved = copy.deepcopy(first.state_dict())
    gone_on = first.rows(*after)
    second.load_state_dict(saved)
    for name, rows in second.rows(*after).items():
        assert torch.equal(rows, whole[name][stop:]) and torch.equal(rows, gone_on[name])


@pytest.mark.parametrize("sound", [True, False])
def test_replayed_spans_have_the_bits_of_plain_ones(text, sound):
    """As a GPU's graphs do; one that differs is told and done without."""
    plain, replayed, replays = run(text, cuts=[40]), FeatureExperts(CONFIG, VOCAB, WIDTH), []

    def record(work, _device):
        def replay():
            work()
            replays.append(sound or replayed.head.steps_DV.mul_(2))

        return replay

    replayed.head.record = record
    with contextlib.nullcontext() if sound else pytest.warns(RuntimeWarning, match="differs"):
        parts = [replayed.rows(*(each[here] for each in text)) for here in (slice(40), slice(40, None))]
    assert torch.equal(torch.cat([part[HEAD] for part in parts]), plain[HEAD])
    assert len(replays) == (7 if sound else 1)  # 16 .. 31, then from 48 to 143: 41 begins within a span


def test_features_of_half_precision_are_taken(text):
    log_rows, features, tokens = text
    half = run((log_rows, features.bfloat16(), tokens))
    rounded = run((log_rows, features.bfloat16().float(), tokens))
    for name, rows in half.items():
        assert rows.dtype == torch.float32 and torch.equal(rows, rounded[name])


def test_cache_sums_by_product_as_a_gpu_does(text, monkeypatch):
    cache = neural_cache.NeuralCache(VOCAB, WIDTH)
    weights, tokens = torch.rand(40, 8), torch.randint(VOCAB, (40,))
    by_index = cache._by_token(weights, tokens)
    cache.device = torch.device("meta")
    monkeypatch.setattr(torch, "zeros", lambda *size, device=None: torch.empty(size).zero_())
    assert (cache._by_token(weights, tokens) - by_index).abs().max() < 1e-5


def test_head_learns_what_a_gradient_step_of_the_output_layer_learns():
    """One step: the logits move by the rate times the gradient of the loss by the layer's weights."""
    random = torch.Generator().manual_seed(0)
    layer = torch.randn(VOCAB, WIDTH, generator=random, requires_grad=True)
    feature, token = torch.randn(WIDTH, generator=random), torch.tensor([4])
    feature /= feature.norm()
    torch.nn.functional.cross_entropy((layer @ feature)[None], token).backward()
    assert layer.grad is not None
    stepped = ((layer - 0.3 * layer.grad) @ feature).softmax(0)
    head = fast_head.FastHead(VOCAB, WIDTH, rate=0.3, memory_tokens=1e9)
    logits = (layer @ feature).detach()
    rows = head.rows(logits.expand(2, -1), feature.expand(2, -1), token.expand(2))
    assert (rows[1] - stepped).abs().max() < 1e-6
