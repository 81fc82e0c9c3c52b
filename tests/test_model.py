"""The transformer, its token trees, its log-probabilities and its generation."""

import copy
import dataclasses
import gc
import math
import random
import weakref
from collections import Counter

import pytest
import torch

import common
import model as model_file
from model import (
    Block,
    Linear,
    ModelConfig,
    TokenLogps,
    Transformer,
    adapt,
    answer_logps,
    answer_token_logps,
    for_inference,
    from_weights,
    generate,
    next_token,
    pack,
    rotate,
)
from tiny import CONFIG, capture_on_the_cpu, draw, draw_trees, has_adapters, new_model


def dense_logits(model, tokens):
    """One sequence through the same weights, written anew: loops, a full matrix, no packing."""
    config, weights = model.config, dict(model.named_parameters())
    head_size = config.n_embd // config.n_head
    group = config.n_head // config.n_kv_head

    def norm(x, name):
        return x / (x.pow(2).mean(-1, keepdim=True) + config.norm_eps).sqrt() * weights[name]

    def turn(x):  # (T, D): the halves of a head are the two parts of complex numbers
        i = torch.arange(head_size // 2)
        rates = config.rope_theta ** (-2.0 * i / head_size)
        angles = torch.arange(len(x))[:, None] * rates
        z = torch.complex(x[:, : head_size // 2], x[:, head_size // 2 :])
        z = z * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), dim=1)

    x = weights["embedding.weight"][torch.tensor(tokens)]
    future = torch.ones(len(tokens), len(tokens), dtype=torch.bool).triu(1)
    for layer in range(config.n_layer):
        name = f"blocks.{layer}"
        heads = norm(x, f"{name}.norm_1.weight") @ weights[f"{name}.attention.qkv.weight"].t()
        heads = heads.split(head_size, dim=1)  # queries, keys, values
        found = []
        for h in range(config.n_head):
            key = config.n_head + h // group
            q = turn(norm(heads[h], f"{name}.attention.q_norm.weight"))
            k = turn(norm(heads[key], f"{name}.attention.k_norm.weight"))
            scores = q @ k.t() / math.sqrt(head_size)
            attention = scores.masked_fill(future, -math.inf).softmax(-1)
            found.append(attention @ heads[key + config.n_kv_head])
        x = x + torch.cat(found, dim=1) @ weights[f"{name}.attention.out.weight"].t()
        gate, up = (
            norm(x, f"{name}.norm_2.weight") @ weights[f"{name}.mlp.gate_up.weight"].t()
        ).split(config.n_hidden, dim=1)
        x = x + (gate * gate.sigmoid() * up) @ weights[f"{name}.mlp.down.weight"].t()
    return norm(x, "norm.weight") @ weights["embedding.weight"].t()


def dense_token_logps(model, trunk, answer):
    logps = dense_logits(model, trunk + answer).log_softmax(-1)
    return torch.stack([logps[len(trunk) + t - 1, token] for t, token in enumerate(answer)])


# ---------------------------------------------------------------- token trees


def test_later_token_changes_nothing_before_it():
    model, tokens = new_model(), draw(random.Random(0), 20)
    before = model(pack([(tokens, [])]))
    for t in range(1, 20):
        changed = tokens[:t] + [(tokens[t] + 1) % CONFIG.vocab_size] + tokens[t + 1 :]
        after = model(pack([(changed, [])]))
        assert torch.equal(after[:t], before[:t])
        assert (after[t:] != before[t:]).any(dim=1).all()  # and it does change what follows


def test_branch_sees_its_trunk_and_not_its_sibling():
    model = new_model()
    trunk, one, other, elsewhere = (draw(random.Random(i), n) for i, n in enumerate((6, 5, 7, 9)))

    def outputs(trunk=trunk, other=other, elsewhere=elsewhere):
        trees = pack([(elsewhere[:4], [elsewhere[4:]]), (trunk, [other, one])])
        return model(trees)[-(len(one) - 1) :]  # those of the last branch of the last tree

    def change(tokens, t):
        return tokens[:t] + [(tokens[t] + 1) % CONFIG.vocab_size] + tokens[t + 1 :]

    with torch.no_grad():
        before = outputs()
        assert all(torch.equal(outputs(other=change(other, t)), before) for t in range(7))
        assert all(torch.equal(outputs(elsewhere=change(elsewhere, t)), before) for t in range(9))
        for t in range(len(trunk)):
            assert (outputs(trunk=change(trunk, t)) != before).any(dim=1).all()


@pytest.mark.parametrize("n_branches", [1, 2, 8])
def test_packed_logps_equal_one_at_a_time(n_branches):
    model, trees = new_model(), draw_trees(n_branches)
    with torch.no_grad():
        packed = answer_token_logps(model, pack(trees))
        alone = [dense_token_logps(model, trunk, a) for trunk, answers in trees for a in answers]
        sums = answer_logps(model, pack(trees))
    assert packed.dtype == sums.dtype == torch.float32
    assert (packed - torch.cat(alone)).abs().max() < 1e-5
    assert torch.allclose(sums, torch.stack([a.sum() for a in alone]), atol=1e-4, rtol=1e-6)
    assert alone[0].mean() < -1  # the comparison is not one of trivial numbers


def test_how_spans_are_grouped_changes_nothing(monkeypatch):
    """From a group for each size to one for all; the work of a group is at most PADDING times its
    spans' own, and nothing is grouped with what it does not fit."""
    model, trees = new_model(), draw_trees(3, n_trees=9)
    outputs, sizes = [], []
    for padding in (1.0, 1.5, 1e9):
        monkeypatch.setattr(model_file, "PADDING", padding)
        packed = pack(trees)
        with torch.no_grad():
            outputs.append(answer_token_logps(model, packed))
        sizes.append(len(packed.groups))
        spans = [(len(t), len(b) - 1, i) for t, branches in trees for i, b in enumerate(branches)]
        causal = [i == 0 or trunk < own for trunk, own, i in spans]
        work = sum((trunk + own) * (trunk + own if plain else own)
                   for (trunk, own, _), plain in zip(spans, causal, strict=True))
        assert sum(g.mask is None for g in packed.groups) in range(1, len(packed.groups))
        padded = sum(g.queries.numel() * g.keys.shape[1] for g in packed.groups)
        assert work <= padded <= padding * work
    assert sizes[0] > sizes[1] > sizes[2] == 2
    assert torch.allclose(outputs[0], outputs[1], atol=1e-5)
    assert torch.allclose(outputs[0], outputs[2], atol=1e-5)


@pytest.mark.parametrize("size", [4, 64])  # of a block: 6 blocks, one
@pytest.mark.parametrize("masked", [False, True])
def test_attention_in_blocks_is_attention(size, masked, monkeypatch):
    """In bfloat16 on the CPU, beside a softmax written out in float64: outputs and gradients."""
    monkeypatch.setattr(model_file.BlockAttention, "SIZE", size)
    monkeypatch.setattr(model_file, "CACHE", 1440)  # a part of the batch at a time
    generator = torch.Generator().manual_seed(0)
    n_keys = 30 if masked else 21
    shapes = (5, 21, 6, 8), (5, n_keys, 2, 8), (5, n_keys, 2, 8)  # spans, tokens, heads, channels
    q, k, v = (torch.randn(s, generator=generator).bfloat16().transpose(1, 2) for s in shapes)
    upstream = torch.randn(5, 6, 21, 8, generator=generator).bfloat16()
    trunks = torch.tensor([9, 3, 0, 5, 9]) if masked else torch.zeros(5, dtype=torch.long)
    last = trunks[:, None, None] + torch.arange(21)[:, None]
    mask = (torch.arange(n_keys) <= last)[:, None]  # (5, 1, 21, n_keys)

    inputs = [x.clone().requires_grad_() for x in (q, k, v)]
    found = model_file.attention(*inputs, mask if masked else None)
    assert type(found.grad_fn).__name__ == "BlockAttentionBackward"
    found.backward(upstream)
    exact = [x.double().requires_grad_() for x in (q, k, v)]
    keys, values = (x.repeat_interleave(3, dim=1) for x in exact[1:])
    scores = (exact[0] @ keys.mT / 8**0.5).masked_fill(~mask, -math.inf)
    wanted = scores.softmax(-1) @ values
    wanted.backward(upstream.double())
    pairs = [(found, wanted), *((x.grad, y.grad) for x, y in zip(inputs, exact, strict=True))]
    for x, y in pairs:
        assert x.dtype == torch.bfloat16 and x.shape == y.shape
        assert (x - y).norm() < 0.01 * y.norm()  # bfloat16 has 8 bits


def test_every_answer_token_is_learned_once_and_never_the_last_one_read():
    """Trunk [1, 2], answers [3, 4, 9] and [5, 9] with end token 9; worked by hand:

        token     1  2 | 3  4 | 5        the two 9s are only predicted
        position  0  1 | 2  3 | 2        a branch goes on from its trunk
        predicts  -  3,5 4  9 | 9        token 2 predicts the first token of both
    """
    trees = pack([([1, 2], [[3, 4, 9], [5, 9]])])
    assert trees.tokens.tolist() == [1, 2, 3, 4, 5]
    assert trees.positions.tolist() == [0, 1, 2, 3, 2]
    assert trees.predictors.tolist() == [1, 2, 3, 1, 4]
    assert trees.targets.tolist() == [3, 4, 9, 5, 9]
    assert trees.answer.tolist() == [0, 0, 0, 1, 1]
    assert trees.n_answers == 2


def test_first_token_and_end_token_are_learned_in_every_branch_of_every_tree():
    end = CONFIG.vocab_size  # a token that occurs at the end of an answer only
    trees = [(t, [a + [end] for a in answers]) for t, answers in draw_trees(3)]
    packed = pack(trees)
    assert packed.targets.tolist() == sum((a for _, answers in trees for a in answers), [])
    assert (packed.targets == end).sum() == packed.n_answers == 18
    assert end not in packed.tokens
    lasts = [len(trunk) - 1 for trunk, answers in trees for _ in answers]
    firsts = packed.predictors[(packed.answer.diff(prepend=torch.tensor([-1])) > 0)]
    assert packed.positions[firsts].tolist() == lasts
    assert packed.tokens[firsts].tolist() == [t[-1] for t, answers in trees for _ in answers]


def test_answer_logps_are_float32_sums_under_bfloat16_autocast():
    model, trees = new_model(), pack(draw_trees(2))
    exact = answer_token_logps(model, trees)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        tokens, sums = answer_token_logps(model, trees), answer_logps(model, trees)
    assert tokens.dtype == sums.dtype == torch.float32
    for i in range(trees.n_answers):
        whole = tokens[trees.answer == i].double().sum()
        assert abs(sums[i] - whole) < 1e-5 * max(1, abs(whole))
    assert not torch.equal(tokens, exact)  # autocast was on
    assert (tokens - exact).abs().mean() < 0.1


def test_bfloat16_logits_cost_little_of_log_p():
    """Logits of about 30 are 0.06 off in bfloat16; relative to the target's they are not."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (300, 2000))
    exact = (outputs.double() @ weight.double().t()).log_softmax(1)
    targets = torch.multinomial(exact.exp(), 1, generator=generator)
    exact = exact.gather(1, targets)[:, 0]
    found = TokenLogps.apply(outputs, weight, targets[:, 0], 100, torch.bfloat16)
    plain = (outputs @ weight.t()).float().log_softmax(1).gather(1, targets)[:, 0]
    assert found.dtype == torch.float32
    assert (found - exact).abs().mean() < 0.002 < 0.01 < (plain - exact).abs().mean()
    assert (found - exact).mean().abs() < 0.0003  # no bias that a sum over tokens would gather


def test_bfloat16_logits_cost_little_of_the_gradient():
    """Of log p with respect to the outputs, against float64; the softmax is in float32."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight = (torch.randn(n, 64, generator=generator).bfloat16() for n in (300, 2000))
    targets = torch.randint(2000, (300,), generator=generator)
    x, y = outputs.double().requires_grad_(), outputs.float().requires_grad_()
    (x @ weight.double().t()).log_softmax(1)[range(300), targets].sum().backward()
    TokenLogps.apply(y, weight.float(), targets, 100, torch.bfloat16).sum().backward()
    assert (y.grad - x.grad).norm() < 0.015 * x.grad.norm()  # 0.03 if the softmax were in bfloat16


def test_logits_are_float32_under_bfloat16_autocast():
    model = new_model()
    outputs = torch.randn(5, CONFIG.n_embd, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found, answers = model.logits(outputs), generate(model, [[1, 2, 3], [4]], (), 5)
    assert found.dtype == torch.float32 and list(map(len, answers)) == [5, 5]
    assert torch.allclose(found, outputs @ model.head_weight.t(), atol=1e-4)


def test_packed_gradients_equal_one_by_one():
    model, trees = new_model(), draw_trees(2)
    weights = torch.linspace(-1, 2, 12)  # each answer enters the loss with a weight of its own
    (answer_logps(model, pack(trees)) * weights).sum().backward()
    packed = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    answers = [(trunk, answer) for trunk, answers in trees for answer in answers]
    for weight, (trunk, answer) in zip(weights, answers, strict=True):
        (dense_token_logps(model, trunk, answer).sum() * weight).backward()
    for name, p in model.named_parameters():
        assert (packed[name] - p.grad).norm() < 1e-4 * p.grad.norm(), name


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_logits_change_nothing_and_bound_what_exists(chunk, monkeypatch):
    model, trees = new_model(), pack(draw_trees(2))
    whole = answer_token_logps(model, trees)
    whole.square().sum().backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()
    sizes, logits = [], model_file.relative_logits

    def watched(outputs, weight, *more):
        sizes.append((len(outputs), len(weight)))
        return logits(outputs, weight, *more)

    monkeypatch.setattr(model_file, "relative_logits", watched)
    monkeypatch.setattr(model_file, "CACHE", 50)  # a few rows at a time
    pieces = answer_token_logps(model, trees, chunk=chunk)
    rows, tokens = zip(*sizes, strict=True)
    assert set(rows) == {len(trees.targets)}  # logits where an answer token is predicted, only
    assert sum(tokens) == CONFIG.vocab_size
    pieces.square().sum().backward()
    assert max(tokens for _, tokens in sizes) <= chunk  # in the backward pass too
    assert torch.allclose(pieces, whole, atol=1e-5)
    for name, p in model.named_parameters():
        assert (gradients[name] - p.grad).norm() < 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("frozen", [False, True])
def test_gradient_of_token_logps_with_a_trained_or_frozen_head(frozen):
    """Against log softmax written out; a frozen head gets no gradient and changes no other one."""
    generator = torch.Generator().manual_seed(0)
    outputs, weight = (torch.randn(n, 8, generator=generator) for n in (10, 29))
    targets = torch.randint(29, (10,), generator=generator)
    upstream = torch.randn(10, generator=generator)
    outputs.requires_grad_(), weight.requires_grad_(not frozen)
    expected = (outputs @ weight.t()).log_softmax(-1)[range(10), targets]
    logps = TokenLogps.apply(outputs, weight, targets, 4, torch.float32)
    assert torch.allclose(logps, expected, atol=1e-5)
    wanted = [outputs] if frozen else [outputs, weight]
    exact = torch.autograd.grad((expected * upstream).sum(), wanted)
    returned = []
    logps.grad_fn.register_hook(lambda inputs, _: returned.extend(inputs))
    (logps * upstream).sum().backward()
    assert (returned[1] is None) == (weight.grad is None) == frozen  # it is as large as the head
    for x, gradient in zip(wanted, exact, strict=True):
        assert torch.allclose(x.grad, gradient, atol=1e-5)


# ---------------------------------------------------------------- activation checkpointing


@pytest.mark.parametrize("rank", [0, 2])
def test_activation_checkpointing_changes_neither_loss_nor_gradients(rank, monkeypatch):
    """And every block does run twice: it is not switched off by frozen weights."""
    calls, forward = Counter(), Block.forward

    def watched(self, *args):
        calls[self] += 1
        return forward(self, *args)

    monkeypatch.setattr(Block, "forward", watched)
    trees, found = pack(draw_trees(2)), []
    for checkpointing in (False, True):
        model = new_model().train()
        adapt(model, rank)
        for module in model.modules():
            if rank and isinstance(module, Linear):
                module.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
        model.checkpointing = checkpointing
        calls.clear()
        loss = answer_logps(model, trees).square().sum()
        loss.backward()
        assert set(calls.values()) == {2 if checkpointing else 1} and len(calls) == CONFIG.n_layer
        found.append((loss, [p.grad for p in model.parameters()]))
    (loss, gradients), (again, same_gradients) = found
    assert torch.equal(loss, again)
    assert any(gradient is not None for gradient in gradients)
    for one, other in zip(gradients, same_gradients, strict=True):
        assert one is other is None or torch.equal(one, other)


def test_activation_checkpointing_keeps_less_for_the_backward_pass():
    """What autograd holds on to between the passes, in bytes."""
    trees, kept = pack(draw_trees(2, n_trees=40)), []
    for checkpointing in (False, True):
        model, sizes = new_model(), {}
        model.checkpointing = checkpointing

        def note(x, sizes=sizes):
            sizes[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            answer_logps(model, trees)
        kept.append(sum(sizes.values()))
    assert kept[1] < kept[0] / 2


# ---------------------------------------------------------------- from weights


def test_from_weights_makes_no_second_copy():
    """When a tensor is asked for, only the one before it is still alive, and no copy of others."""
    model, trees, given = new_model(), pack(draw_trees(2)), []
    sizes = [p.numel() * p.element_size() for p in model.parameters()]
    gc.freeze()  # what is there already is not among gc's objects

    def live_bytes():
        tensors = [x for x in gc.get_objects() if issubclass(type(x), torch.Tensor)]
        return sum({x.untyped_storage().data_ptr(): x.untyped_storage().nbytes()
                    for x in tensors if x.device.type == "cpu"}.values())

    def weights():
        for name, p in model.named_parameters():
            assert sum(tensor() is not None for tensor in given) <= 1, name
            assert sum(sizes[: len(given)]) <= live_bytes() <= sum(sizes) + max(sizes), name
            tensor = p.detach().clone()
            given.append(weakref.ref(tensor))
            yield name, tensor
            del tensor

    try:
        again = from_weights(model.config, weights(), "cpu")
    finally:
        gc.unfreeze()
    assert len(given) == len(sizes)
    assert torch.equal(again(trees), model(trees))


def test_from_weights_in_bfloat16_rounds_the_linear_layers_of_blocks_only():
    config = dataclasses.replace(CONFIG, tied=False, qkv_bias=True)
    model = new_model(config)
    rounded = from_weights(config, model.named_parameters(), "cpu", torch.bfloat16)
    kinds = {name: p.dtype for name, p in rounded.named_parameters()}
    linear = {f"blocks.{i}.{layer}" for i in range(CONFIG.n_layer) for layer in (
        "attention.qkv.weight", "attention.qkv.bias", "attention.out.weight", "mlp.gate_up.weight",
        "mlp.down.weight")}
    assert {name for name, kind in kinds.items() if kind == torch.bfloat16} == linear
    assert set(kinds.values()) == {torch.bfloat16, torch.float32}
    for name, p in model.named_parameters():
        assert torch.equal(rounded.get_parameter(name), p.to(kinds[name])), name
    # Under autocast, which rounds these weights itself, nothing changes.
    trees = pack(draw_trees(2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(answer_logps(rounded, trees), answer_logps(model, trees))


@pytest.mark.parametrize("change", ["missing", "left over", "shape", "twice"])
def test_from_weights_refuses_what_is_not_the_models(change):
    weights = [(name, p.detach()) for name, p in new_model().named_parameters()]
    name, tensor = weights[3]
    weights = {
        "missing": weights[:3] + weights[4:],
        "left over": [*weights, ("blocks.9.mlp.down.weight", tensor)],
        "shape": weights[:3] + [(name, tensor.t()[:-1])] + weights[4:],
        "twice": [*weights, weights[3]],
    }[change]
    named = "blocks.9.mlp.down.weight" if change == "left over" else name
    with pytest.raises(ValueError, match=f"^{named}: "):
        from_weights(CONFIG, weights, "cpu")


# ---------------------------------------------------------------- for inference


@pytest.mark.parametrize("changes", [{}, {"tied": False, "qkv_bias": True}, {"vocab_size": 30}])
@pytest.mark.parametrize("rank", [0, 2])
def test_for_inference_changes_nothing(changes, rank):
    """Outputs, logits of many rows and of one, answers; adapters are merged."""
    config = dataclasses.replace(CONFIG, **changes)
    model, prompts = new_model(config), [draw(random.Random(i), n) for i, n in enumerate((9, 1, 5))]
    adapt(model, rank)
    for module in model.modules():
        if rank and isinstance(module, Linear):
            module.lora_b.data.normal_(generator=torch.Generator().manual_seed(1))
    trees = pack(draw_trees(3))
    for sampling in (False, True):
        packed = for_inference(copy.deepcopy(model), sampling)
        assert (packed.packed_head is not None) == sampling
        with torch.no_grad():
            expected, found = model(trees), packed(trees)
            assert torch.allclose(found, expected, atol=1e-4)
            for rows in (expected, expected[:1]):
                assert torch.allclose(packed.logits(rows), model.logits(rows), atol=1e-4)
        for some in (prompts, prompts[:1]):
            assert generate(packed, some, (), 12) == generate(model, some, (), 12)
    assert not has_adapters(packed) and all(
        module.weight is None for module in packed.modules() if isinstance(module, Linear))


def test_for_inference_in_bfloat16_is_exact():
    rounded = from_weights(CONFIG, new_model().named_parameters(), "cpu", torch.bfloat16)
    trees = pack(draw_trees(2))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        before = answer_logps(rounded, trees)
        assert torch.equal(answer_logps(for_inference(rounded), trees), before)


# ---------------------------------------------------------------- the network


def test_grouped_query_equals_full_heads_with_repeated_weights():
    grouped, trees = new_model(), pack(draw_trees(2))
    full = Transformer(dataclasses.replace(CONFIG, n_kv_head=CONFIG.n_head)).eval()
    weights = grouped.state_dict()
    for name in [name for name in weights if name.endswith("qkv.weight")]:
        q, k, v = weights[name].split((32, 16, 16))  # 4 queries, 2 keys, 2 values of size 8
        k, v = (x.view(2, 8, 32).repeat_interleave(2, dim=0).reshape(32, 32) for x in (k, v))
        weights[name] = torch.cat((q, k, v))
    full.load_state_dict(weights)
    assert torch.allclose(full(trees), grouped(trees), atol=1e-5)


def test_rope_depends_on_relative_position_only():
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 8, generator=generator).unbind(0)
    rates = 10000.0 ** (-torch.arange(4) / 4)

    def score(i, j):
        angles = (torch.tensor([[i], [j]]) * rates)[:, None]
        cos, sin = angles.cos().repeat(1, 1, 2), torch.cat((-angles.sin(), angles.sin()), dim=-1)
        turned = rotate(torch.stack((q, k)), cos, sin)
        return (turned[0] * turned[1]).sum().item()

    assert score(0, 0) == pytest.approx((q * k).sum().item(), abs=1e-5)
    assert score(5, 3) == pytest.approx(score(12, 10), abs=1e-5)
    assert abs(score(5, 3) - score(3, 5)) > 1e-2
    model, trees = new_model(), pack(draw_trees(2))
    moved = dataclasses.replace(trees, positions=trees.positions + 11)
    spread = dataclasses.replace(trees, positions=trees.positions * 2)
    assert torch.allclose(model(moved), model(trees), atol=1e-4)
    assert not torch.allclose(model(spread), model(trees), atol=1e-2)


def test_overfits_one_batch():
    torch.manual_seed(0)
    model = Transformer(CONFIG).initialize(torch.Generator().manual_seed(0))
    trees = pack([([1, 2], [[3, 4, 0], [5, 0]]), ([2, 1], [[6, 0], [7, 8, 9, 0]])])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = -answer_token_logps(model, trees).mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    # The first token of two branches of one trunk can be right in half of the cases at best.
    assert loss.item() == pytest.approx(4 * math.log(2) / len(trees.targets), abs=0.02)


def test_saved_weights_come_back_exactly(tmp_path):
    model, trees = new_model(), pack(draw_trees(2))
    common.save_tensors(tmp_path / "model.pt", model.state_dict())
    again = Transformer(ModelConfig(**dataclasses.asdict(model.config)))
    again.load_state_dict(common.load_tensors(tmp_path / "model.pt"))
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), again.parameters(),
                                                 strict=True))
    assert torch.equal(again(trees), model(trees))


# ---------------------------------------------------------------- generation


def greedy_uncached(model, prompt, n):
    """The likeliest token again and again, the whole sequence run anew each time."""
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(n):
            tokens.append(dense_logits(model, tokens)[-1].argmax().item())
    return tokens[len(prompt) :]


def until(tokens, end):
    return tokens[: tokens.index(end)] if end in tokens else tokens


@pytest.mark.parametrize("captured", [False, True])
def test_cached_generation_equals_uncached(captured, monkeypatch):
    """Every token of the vocabulary in turn ends an answer, so sequences leave at many steps."""
    captures = capture_on_the_cpu(monkeypatch) if captured else []
    model, rng = new_model(), random.Random(3)
    prompts = [draw(rng, n) for n in (1, 17, 4, 9, 2, 9)]
    free = [greedy_uncached(model, prompt, 15) for prompt in prompts]
    assert generate(model, prompts, (), 15) == free
    lengths, counts = set(), set()
    for end in range(CONFIG.vocab_size):
        expected = [until(tokens, end) for tokens in free]
        captures.clear()
        assert generate(model, prompts, [end], 15) == expected
        counts.add(len(captures))
        lengths.add(len({len(tokens) for tokens in expected}))
    assert max(lengths) > 2  # one batch finished at three different steps or more
    assert 1 < max(counts) <= 3 if captured else counts == {0}  # of six sequences, three, one


def test_cached_generation_in_bfloat16():
    """It rounds otherwise than a pass over the whole: each token is nearly the likeliest there."""
    model, rng = new_model(), random.Random(3)
    prompts = [draw(rng, n) for n in (1, 17, 4, 9)]
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        for prompt, answer in zip(prompts, generate(model, prompts, (), 15), strict=True):
            whole = prompt + answer
            logits = model.logits(model(pack([(whole[:-1], [])])))[len(prompt) - 1 :]
            chosen = logits[range(15), answer]
            assert (logits.amax(1) - chosen).max() < 0.05 * logits.std()


def test_nothing_is_captured_where_processes_talk_to_each_other(monkeypatch):
    captures, model = capture_on_the_cpu(monkeypatch), new_model()
    answers = generate(model, [[1, 2]], (), 5)
    assert len(captures) == 1
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    assert generate(model, [[1, 2]], (), 5) == answers and len(captures) == 1


def test_what_prompts_share_runs_once(monkeypatch):
    """Equal prompts, one that is the beginning of another, and a long common beginning."""
    model, rng, rows = new_model(), random.Random(5), []
    start = draw(rng, 8)
    prompts = [start + draw(rng, 3), start, start + draw(rng, 1), start, start + draw(rng, 6)]
    expected = [greedy_uncached(model, prompt, 9) for prompt in prompts]
    forward = Block.forward

    def watched(self, x, *args):
        rows.append(len(x))
        return forward(self, x, *args)

    monkeypatch.setattr(Block, "forward", watched)
    assert generate(model, prompts, (), 9) == expected
    assert rows[0] == 7 + (4 + 1 + 2 + 1 + 7)  # each keeps its last token, so the trunk has 7
    assert set(rows[CONFIG.n_layer :]) == {5}


def test_finished_rows_leave_the_batch(monkeypatch):
    """Prompts with room for 8, 4 and 2 tokens: the first token comes from the prompts' pass."""
    model, rows = new_model(), []
    forward = Transformer.forward

    def counted(self, trees, cache=None):
        rows.append(len(trees.tokens))
        return forward(self, trees, cache)

    monkeypatch.setattr(Transformer, "forward", counted)
    rng = random.Random(0)
    answers = generate(model, [draw(rng, n) for n in (32, 36, 38)], (), 8)
    assert list(map(len, answers)) == [8, 4, 2]
    assert rows[1:] == [3, 2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("captured", [False, True])
def test_generation_stops_at_block_size_and_at_max_new_tokens(captured, monkeypatch):
    if captured:
        capture_on_the_cpu(monkeypatch)
    model, rng = new_model(), random.Random(4)
    prompts = [draw(rng, n) for n in (3, 40, 38, 31, 39)]  # the block size is 40
    found = generate(model, prompts, (), 6)
    assert [len(tokens) for tokens in found] == [6, 0, 2, 6, 1]
    assert found == [greedy_uncached(model, p, len(a)) for p, a in zip(prompts, found, strict=True)]
    assert [len(tokens) for tokens in generate(model, prompts, (), 100)] == [37, 0, 2, 9, 1]
    assert generate(model, prompts[1:2], (), 6) == [[]]


def test_sampling_is_reproducible_by_seed():
    model, prompts = new_model(), [[1, 2, 3], [4]]

    def sample(seed):
        generator = torch.Generator().manual_seed(seed)
        return generate(model, prompts, (), 20, generator, temperature=1.0, top_p=0.95)

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"temperature": 1.0}, [0.15, 0.5, 0.1, 0.25]),
        ({"temperature": 1.0, "top_k": 2}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_k": 9}, [0.15, 0.5, 0.1, 0.25]),
        # Tokens in order of probability: 0.5, 0.25, 0.15, 0.1; kept until their sum reaches top_p.
        ({"temperature": 1.0, "top_p": 0.3}, [0, 1, 0, 0]),
        ({"temperature": 1.0, "top_p": 0.7}, [0, 2 / 3, 0, 1 / 3]),
        ({"temperature": 1.0, "top_p": 0.8}, [0.15 / 0.9, 0.5 / 0.9, 0, 0.25 / 0.9]),
        # Temperature 1/2 squares the probabilities; their sum is then 0.345.
        ({"temperature": 0.5}, [0.0225 / 0.345, 0.25 / 0.345, 0.01 / 0.345, 0.0625 / 0.345]),
        # Of the squares 0.25 alone makes up 0.72, so at 0.7 nothing else is left.
        ({"temperature": 0.5, "top_p": 0.7}, [0, 1, 0, 0]),
        ({"temperature": 0.0}, [0, 1, 0, 0]),
    ],
)
def test_next_token_against_a_hand_worked_distribution(settings, expected):
    n = 20000
    logits = torch.tensor([0.15, 0.5, 0.1, 0.25]).log().expand(n, 4) + 3.0
    draws = [
        next_token(logits, generator=torch.Generator().manual_seed(seed), **settings)
        for seed in (0, 0)
    ]
    assert torch.equal(*draws)
    shares = torch.bincount(draws[0], minlength=4) / n
    assert (shares[torch.tensor(expected) == 0] == 0).all()
    assert shares.tolist() == pytest.approx(expected, abs=0.015)  # four standard deviations
