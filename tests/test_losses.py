"""The objective against torch's own losses, its gradients, and its masks."""

import pytest
import torch
from torch.nn import functional as F

from capacity_gap.distill import distill_loss, losses

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
