"""The objective against torch's own losses, its gradients, and its masks."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from capacity_gap.distill import distill_loss, divergences, fused, losses
from capacity_gap.distill.hidden import HiddenMatch
from capacity_gap.distill.signal_kinds import SIGNALS
from capacity_gap.distill.sparse import SparseTargets

B, T, D, E, V = 2, 5, 4, 6, 11


@pytest.fixture(params=[3, 1000], ids=["chunked", "whole"])
def parts(request, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_TOKENS", request.param)
    monkeypatch.setattr(losses, "CHUNK_ELEMENTS", 1)
    g = torch.Generator().manual_seed(0)
    hidden, weight, th, tw = (
        torch.randn(s, generator=g, dtype=torch.float64) for s in ((B, T, D), (V, D), (B, T, E), (V, E))
    )
    labels = torch.randint(0, V, (B, T), generator=g)
    labels[0, 1] = labels[1, 4] = losses.IGNORE
    return hidden.requires_grad_(), weight.requires_grad_(), labels, {"teacher_hidden": th, "teacher_weight": tw}


def skew_of(loss):
    return divergences.LOSSES.entry(loss).traits["skew"]


@pytest.mark.parametrize("tau", [1.0, 2.5])
@pytest.mark.parametrize("squared", [True, False])
@pytest.mark.parametrize("w", [0.0, 0.3, 1.0])
def test_value_and_gradients_equal_the_dense_form(parts, tau, squared, w):
    hidden, weight, labels, teacher = parts
    found, _ = distill_loss(hidden, weight, labels, **teacher, kd_weight=w, temperature=tau, tau_squared=squared)
    keep = labels != losses.IGNORE
    z, zt = (hidden @ weight.T)[keep], (teacher["teacher_hidden"] @ teacher["teacher_weight"].T)[keep]
    kl = F.kl_div((z / tau).log_softmax(-1), (zt / tau).log_softmax(-1), log_target=True, reduction="batchmean")
    dense = (1 - w) * F.cross_entropy(z, labels[keep]) + w * (tau**2 if squared else 1) * kl
    torch.testing.assert_close(found, dense)
    for a, b in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(a, b)


def test_gradcheck(parts):
    hidden, weight, labels, teacher = parts
    assert torch.autograd.gradcheck(lambda h, w: distill_loss(h, w, labels, **teacher)[0], (hidden, weight))


DENSE = {
    "forward_kl": lambda p, q, a: (p * (p / q).log()).sum(-1),
    "soft_ce": lambda p, q, a: -(p * q.log()).sum(-1),
    "reverse_kl": lambda p, q, a: (q * (q / p).log()).sum(-1),
    "js": lambda p, q, a: (
        a * (p * (p / (a * p + (1 - a) * q)).log()).sum(-1) + (1 - a) * (q * (q / (a * p + (1 - a) * q)).log()).sum(-1)
    ),
    "skewed_forward_kl": lambda p, q, a: (p * (p / (a * p + (1 - a) * q)).log()).sum(-1),
    "skewed_reverse_kl": lambda p, q, a: (q * (q / ((1 - a) * p + a * q)).log()).sum(-1),
    "tvd": lambda p, q, a: (p - q).abs().sum(-1) / 2,
}


def test_every_registered_loss_is_tested_and_can_be_configured():
    assert set(DENSE) == set(divergences.LOSSES)


@pytest.mark.parametrize("loss", DENSE)
@pytest.mark.parametrize(("tau", "skew"), [(1.0, None), (2.5, 0.3)])
def test_every_loss_and_its_gradient_equal_the_dense_form(parts, loss, tau, skew):
    hidden, weight, labels, teacher = parts
    given = {"loss": loss, "kd_weight": 0.7, "temperature": tau, "skew": skew}
    found, values = distill_loss(hidden, weight, labels, **teacher, **given)
    keep = labels != losses.IGNORE
    z, zt = (hidden @ weight.T)[keep], (teacher["teacher_hidden"] @ teacher["teacher_weight"].T)[keep]
    p, q = (zt / tau).softmax(-1), (z / tau).softmax(-1)
    a = skew_of(loss) if skew is None else skew
    kd = DENSE[loss](p, q, a).mean()
    dense = 0.3 * F.cross_entropy(z, labels[keep]) + 0.7 * tau**2 * kd
    torch.testing.assert_close(found, dense)
    torch.testing.assert_close(values["kd"], kd.detach())
    torch.testing.assert_close(values["kl"], DENSE["forward_kl"](p, q, a).mean().detach())
    pairs = zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("loss", DENSE)
@pytest.mark.parametrize("caps", [(1.5, None), (None, 0.8), (2.0, 1.0)])
def test_capped_logits_equal_the_dense_form(parts, loss, caps):
    hidden, weight, labels, teacher = parts
    given = {"loss": loss, "kd_weight": 0.7, "temperature": 1.5, "student_cap": caps[0], "teacher_cap": caps[1]}
    found, _ = distill_loss(hidden, weight, labels, **teacher, **given)
    keep = labels != losses.IGNORE
    z, zt = (hidden @ weight.T)[keep], (teacher["teacher_hidden"] @ teacher["teacher_weight"].T)[keep]
    z, zt = (x if c is None else c * (x / c).tanh() for x, c in zip((z, zt), caps, strict=True))
    p, q = (zt / 1.5).softmax(-1), (z / 1.5).softmax(-1)
    dense = 0.3 * F.cross_entropy(z, labels[keep]) + 0.7 * 1.5**2 * DENSE[loss](p, q, skew_of(loss)).mean()
    torch.testing.assert_close(found, dense)
    pairs = zip(torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)), strict=True)
    for one, two in pairs:
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("loss", [n for n in DENSE if n != "tvd"])
def test_gradcheck_of_every_smooth_loss(parts, loss):
    hidden, weight, labels, teacher = parts
    assert torch.autograd.gradcheck(
        lambda h, w: distill_loss(h, w, labels, **teacher, loss=loss)[0], (hidden, weight), atol=1e-6
    )


@pytest.mark.parametrize("loss", [n for n in DENSE if n not in ("soft_ce",)])
def test_no_distance_from_itself(parts, loss):
    hidden, weight, labels, _ = parts
    own = {"teacher_hidden": hidden.detach(), "teacher_weight": weight.detach()}
    found, values = distill_loss(hidden, weight, labels, **own, loss=loss, kd_weight=1.0)
    assert abs(values["kd"]) < 1e-12
    assert torch.autograd.grad(found, hidden)[0].abs().max() < 1e-12


@pytest.mark.parametrize("loss", DENSE)
def test_distances_stay_finite_where_probabilities_underflow(loss):
    hidden = torch.tensor([[[200.0, -200.0]]], requires_grad=True)
    one = torch.eye(2)
    found, _ = distill_loss(
        hidden, one, torch.tensor([[1]]), teacher_hidden=-hidden.detach(), teacher_weight=one, loss=loss
    )
    assert torch.isfinite(found)
    assert torch.isfinite(torch.autograd.grad(found, hidden)[0]).all()


# Cached targets


def targets_of(teacher, kind, size, *, tau=1.0, seed=0):
    """What a signal would hold of the parts' teacher, in double precision."""
    logits = (teacher["teacher_hidden"] @ teacher["teacher_weight"].T).flatten(0, 1) / tau
    softmax = divergences.Softmax.of(logits)
    ids, values = SIGNALS[kind].targets(softmax, size, torch.Generator().manual_seed(seed))
    if kind == "topk":  # as stored, in half precision: here exactly
        values = logits.log_softmax(-1).gather(1, ids)
    return SparseTargets(kind, ids, values.double() / (size if kind == "sampled" else 1), softmax.entropy())


@pytest.mark.parametrize("loss", DENSE)
@pytest.mark.parametrize("tau", [1.0, 2.0])
def test_topk_of_all_but_one_token_is_the_dense_loss(parts, loss, tau):
    """The bucket of the rest then holds one token, and nothing is lost."""
    hidden, weight, labels, teacher = parts
    given = {"loss": loss, "kd_weight": 0.6, "temperature": tau}
    exact, _ = distill_loss(hidden, weight, labels, **teacher, **given)
    found, _ = distill_loss(hidden, weight, labels, signal=targets_of(teacher, "topk", V - 1, tau=tau), **given)
    torch.testing.assert_close(found, exact)
    for one, two in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("loss", [n for n in DENSE if n != "tvd"])
def test_topk_gradients(parts, loss):
    hidden, weight, labels, teacher = parts
    targets = targets_of(teacher, "topk", 4)
    assert torch.autograd.gradcheck(
        lambda h, w: distill_loss(h, w, labels, signal=targets, loss=loss)[0], (hidden, weight), atol=1e-6
    )


def test_topk_with_one_bucket_never_exceeds_the_true_divergence(parts):
    """Merging outcomes loses information: forward KL over buckets is a lower bound."""
    hidden, weight, labels, teacher = parts
    exact = distill_loss(hidden, weight, labels, **teacher)[1]["kl"]
    found = [distill_loss(hidden, weight, labels, signal=targets_of(teacher, "topk", k))[1]["kl"] for k in (1, 4, 9)]
    assert found == sorted(found)
    assert found[-1] <= exact


@pytest.mark.parametrize("loss", divergences.LOSSES.that(samples=True))
def test_samples_are_unbiased_in_value_and_gradient(parts, loss):
    hidden, weight, labels, teacher = parts
    exact, _ = distill_loss(hidden, weight, labels, **teacher, loss=loss, kd_weight=1.0)
    true = torch.autograd.grad(exact, hidden)[0]
    draws = []
    for seed in range(600):
        one, _ = distill_loss(
            hidden, weight, labels, signal=targets_of(teacher, "sampled", 8, seed=seed), loss=loss, kd_weight=1.0
        )
        draws.append((one.detach(), torch.autograd.grad(one, hidden)[0]))
    values = torch.stack([d[0] for d in draws])
    assert abs(values.mean() - exact) < 4 * values.std() / len(draws) ** 0.5
    grads = torch.stack([d[1] for d in draws])
    errors = (grads.mean(0) - true) / (grads.std(0) / len(draws) ** 0.5).clamp_min(1e-12)
    assert errors.abs().max() < 5
    assert values.std() > 0


def test_draws_are_distinct_tokens_with_their_counts(parts):
    *_, teacher = parts
    targets = targets_of(teacher, "sampled", 50)
    torch.testing.assert_close(targets.values.sum(-1), torch.ones(B * T, dtype=torch.float64))
    for ids, shares in zip(targets.ids, targets.values, strict=True):
        drawn = ids[shares > 0].tolist()
        assert len(drawn) == len(set(drawn))


def test_samples_refuse_what_they_cannot_estimate(parts):
    hidden, weight, labels, teacher = parts
    with pytest.raises(ValueError, match="supports only forward_kl and soft_ce, not reverse_kl"):
        distill_loss(hidden, weight, labels, signal=targets_of(teacher, "sampled", 8), loss="reverse_kl")


def test_parts_are_the_means_of_ce_kl_and_teacher_entropy(parts):
    hidden, weight, labels, teacher = parts
    _, found = distill_loss(hidden, weight, labels, **teacher)
    keep = labels != losses.IGNORE
    log_q = (hidden @ weight.T)[keep].log_softmax(-1)
    log_p = (teacher["teacher_hidden"] @ teacher["teacher_weight"].T)[keep].log_softmax(-1)
    soft_ce = -(log_p.exp() * log_q).sum(-1).mean()
    torch.testing.assert_close(found["ce"], F.nll_loss(log_q, labels[keep]))
    torch.testing.assert_close(found["kl"] + found["teacher_entropy"], soft_ce)


def test_a_student_equal_to_its_teacher_has_no_divergence_and_no_kd_gradient(parts):
    hidden, weight, labels, _ = parts
    loss, found = distill_loss(
        hidden, weight, labels, teacher_hidden=hidden.detach(), teacher_weight=weight.detach(), kd_weight=1.0
    )
    assert abs(found["kl"]) < 1e-12
    assert torch.autograd.grad(loss, hidden)[0].abs().max() < 1e-12


def test_masked_positions_have_no_gradient_and_no_share_in_the_mean(parts):
    hidden, weight, labels, teacher = parts
    loss, _ = distill_loss(hidden, weight, labels, **teacher)
    gradient = torch.autograd.grad(loss, hidden)[0]
    assert torch.all(gradient[labels == losses.IGNORE] == 0)
    changed = hidden.detach().clone()
    changed[0, 1] += 100
    torch.testing.assert_close(distill_loss(changed, weight, labels, **teacher)[0], loss)


def test_all_masked_is_zero_not_nan(parts):
    hidden, weight, labels, teacher = parts
    loss, _ = distill_loss(hidden, weight, torch.full_like(labels, losses.IGNORE), **teacher)
    assert loss == 0


def test_label_count_splits_a_batch_exactly(parts):
    hidden, weight, labels, teacher = parts
    count = int((labels != losses.IGNORE).sum())
    whole, _ = distill_loss(hidden, weight, labels, **teacher)
    halves = [
        distill_loss(
            hidden[i : i + 1],
            weight,
            labels[i : i + 1],
            teacher_hidden=teacher["teacher_hidden"][i : i + 1],
            teacher_weight=teacher["teacher_weight"],
            label_count=count,
        )[0]
        for i in range(B)
    ]
    torch.testing.assert_close(sum(halves), whole)


def test_kd_without_a_teacher_says_so(parts):
    hidden, weight, labels, _ = parts
    with pytest.raises(ValueError, match="needs teacher_hidden"):
        distill_loss(hidden, weight, labels, kd_weight=0.5)


def test_huge_logits_stay_finite():
    hidden = torch.tensor([[[1e4, -1e4]]], requires_grad=True)
    loss, _ = distill_loss(
        hidden, torch.eye(2), torch.tensor([[1]]), teacher_hidden=-hidden.detach(), teacher_weight=torch.eye(2)
    )
    assert torch.isfinite(loss)
    assert torch.isfinite(torch.autograd.grad(loss, hidden)[0]).all()


# Vocabularies padded to two heights


@pytest.mark.parametrize("loss", DENSE)
@pytest.mark.parametrize("w", [0.4, 1.0])
def test_rows_that_only_one_side_has_take_no_part_in_kd(parts, loss, w):
    hidden, weight, labels, teacher = parts
    labels = labels.clamp_max(V - 3)
    taller = torch.cat((teacher["teacher_weight"], torch.ones(4, E, dtype=torch.float64)))
    equal, _ = distill_loss(hidden, weight, labels, **teacher, loss=loss, kd_weight=w)
    cropped, _ = distill_loss(hidden, weight, labels, **{**teacher, "teacher_weight": taller}, loss=loss, kd_weight=w)
    torch.testing.assert_close(cropped, equal)

    lower = {**teacher, "teacher_weight": teacher["teacher_weight"][: V - 2]}
    found, _ = distill_loss(hidden, weight, labels, **lower, loss=loss, kd_weight=w)
    keep = labels != losses.IGNORE
    z, zt = (hidden @ weight.T)[keep], (teacher["teacher_hidden"] @ lower["teacher_weight"].T)[keep]
    p, q = zt.softmax(-1), z[:, : V - 2].softmax(-1)
    dense = (1 - w) * F.cross_entropy(z, labels[keep]) + w * DENSE[loss](p, q, skew_of(loss)).mean()
    torch.testing.assert_close(found, dense)
    for one, two in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(dense, (hidden, weight)), strict=True
    ):
        torch.testing.assert_close(one, two)


# What it costs, and in single precision


class Largest(TorchDispatchMode):
    """The largest tensor that any operation makes."""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, tuple | list) else [found]:
            if isinstance(tensor, torch.Tensor):
                self.numel = max(self.numel, tensor.numel())
        return found


@pytest.mark.parametrize("tokens", [512, 4096])
def test_no_tensor_grows_with_tokens_times_vocabulary(tokens):
    vocabulary = 4096
    hidden, weight = torch.randn(1, tokens, 8, requires_grad=True), torch.randn(vocabulary, 8, requires_grad=True)
    labels = torch.zeros(1, tokens, dtype=torch.long)
    with Largest() as largest:
        distill_loss(hidden, weight, labels, teacher_hidden=hidden.detach(), teacher_weight=weight.detach())[
            0
        ].backward()
    assert largest.numel == max(losses.CHUNK_TOKENS * vocabulary, losses.CHUNK_ELEMENTS)


@pytest.mark.parametrize("loss", DENSE)
def test_single_precision_agrees_with_the_dense_form_to_1e_5(loss):
    g = torch.Generator().manual_seed(1)
    hidden, weight = torch.randn(2, 64, 16, generator=g), torch.randn(500, 16, generator=g)
    taught, teacher = torch.randn(2, 64, 24, generator=g), torch.randn(500, 24, generator=g) / 2
    labels = torch.randint(0, 500, (2, 64), generator=g)
    hidden.requires_grad_(), weight.requires_grad_()
    found, _ = distill_loss(hidden, weight, labels, teacher_hidden=taught, teacher_weight=teacher, loss=loss)
    z, zt = hidden.double() @ weight.double().T, taught.double() @ teacher.double().T
    p, q = zt.softmax(-1), z.softmax(-1)
    exact = 0.5 * F.cross_entropy(z.flatten(0, 1), labels.flatten())
    exact = exact + 0.5 * DENSE[loss](p, q, skew_of(loss)).mean()
    assert abs(float((found - exact).detach())) < 1e-5 * float(exact.detach())
    for one, two in zip(
        torch.autograd.grad(found, (hidden, weight)), torch.autograd.grad(exact, (hidden, weight)), strict=True
    ):
        assert (one - two).norm() < 1e-5 * two.norm()


# Liger's kernels


def torch_cross_entropy():
    return lambda weight, hidden, labels: F.cross_entropy(hidden @ weight.T, labels, reduction="sum")


def torch_forward_kl(tau):
    def mean(hidden, weight, teacher_hidden, teacher_weight, labels):
        keep = labels != losses.IGNORE
        z, zt = (hidden @ weight.T / tau)[keep], (teacher_hidden @ teacher_weight.T / tau)[keep]
        return F.kl_div(z.log_softmax(-1), zt.log_softmax(-1), log_target=True, reduction="batchmean")

    return mean


@pytest.mark.parametrize(("w", "tau"), [(0.0, 1.0), (0.3, 2.0), (1.0, 1.0)])
@pytest.mark.parametrize("count", [None, 20.0])
def test_with_fused_kernels_the_objective_is_the_same(parts, monkeypatch, w, tau, count):
    """torch's own losses in the kernels' place, with the kernels' signatures and reductions."""
    hidden, weight, labels, teacher = parts
    given = {**teacher, "kd_weight": w, "temperature": tau, "label_count": count}
    ours, ours_parts = distill_loss(hidden, weight, labels, **given)
    expected = torch.autograd.grad(ours, (hidden, weight))
    monkeypatch.setattr(fused, "cross_entropy", torch_cross_entropy)
    monkeypatch.setattr(fused, "forward_kl", torch_forward_kl)
    monkeypatch.setattr(fused, "serves", lambda *_, **__: True)
    found, found_parts = distill_loss(hidden, weight, labels, **given)
    torch.testing.assert_close(found, ours)
    for name, value in found_parts.items():
        torch.testing.assert_close(value, ours_parts[name])
    for one, two in zip(torch.autograd.grad(found, (hidden, weight)), expected, strict=True):
        torch.testing.assert_close(one, two)


def test_fused_kernels_serve_only_what_they_compute_exactly(monkeypatch):
    class OnCuda:
        device = torch.device("cuda")

    weight, pair = torch.zeros(8, 2), (torch.zeros(3, 2), torch.zeros(8, 2))
    given = {"loss": "forward_kl", "kd_weight": 0.5, "teacher": pair, "weight": weight}
    monkeypatch.setattr(fused, "installed", lambda: True)
    assert fused.serves(OnCuda(), **given)
    assert fused.serves(OnCuda(), **{**given, "kd_weight": 0.0, "teacher": None})
    assert not fused.serves(torch.zeros(3, 2), **given), "not on a CPU"
    for other in ({"loss": "soft_ce"}, {"loss": "js"}, {"teacher": object()}, {"weight": torch.zeros(9, 2)}):
        assert not fused.serves(OnCuda(), **{**given, **other})
    monkeypatch.setattr(fused, "installed", lambda: False)
    assert not fused.serves(OnCuda(), **given)


# Hidden states


def test_equal_hidden_states_match_and_masked_ones_do_not_count():
    hidden, labels = torch.randn(1, 4, 6), torch.tensor([[1, losses.IGNORE, 2, 3]])
    match = HiddenMatch(6, 6)
    assert list(match.parameters()) == []
    assert abs(float(match(hidden, 3 * hidden, labels))) < 1e-6
    opposite = hidden.clone()
    opposite[0, 0] *= -1
    opposite[0, 1] = torch.randn(6)
    torch.testing.assert_close(match(opposite, hidden, labels), torch.tensor(2.0))


def test_other_widths_are_mapped_first_without_loss_and_the_same_way_every_time():
    one, two = HiddenMatch(4, 6), HiddenMatch(4, 6)
    weight = one.projection.weight
    assert torch.equal(weight, two.projection.weight)
    torch.testing.assert_close(weight.T @ weight, torch.eye(4))


@pytest.mark.parametrize("kd_weight", [0.0, 0.5])
def test_under_autocast_the_output_layer_is_multiplied_in_bf16(kd_weight):
    """As a model's own output layer would be: only the products round, the losses are fp32, and so are gradients."""
    g = torch.Generator().manual_seed(0)
    hidden, weight, th, tw = (torch.randn(s, generator=g) for s in ((B, T, 32), (V, 32), (B, T, 48), (V, 48)))
    labels = torch.randint(0, V, (B, T), generator=g)
    given = {"teacher_hidden": th, "teacher_weight": tw, "kd_weight": kd_weight}
    hidden.requires_grad_()
    weight.requires_grad_()
    with torch.autocast("cpu", torch.bfloat16):
        found, parts = distill_loss(hidden, weight, labels, **given)
        z, zt = (F.linear(h, w).float().flatten(0, 1) for h, w in ((hidden, weight), (th, tw)))
    kl = F.kl_div(z.log_softmax(-1), zt.log_softmax(-1), log_target=True, reduction="batchmean")
    expected = (1 - kd_weight) * F.cross_entropy(z, labels.flatten()) + kd_weight * kl
    assert found.dtype == parts["ce"].dtype == torch.float32
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
    ours, theirs = (torch.autograd.grad(value, (hidden, weight)) for value in (found, expected))
    for one, two in zip(ours, theirs, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one, two, rtol=0.02, atol=1e-3)
    plain, _ = distill_loss(hidden, weight, labels, **given)
    assert plain != found, "the products did round"
