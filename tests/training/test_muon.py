import pytest
import torch

from tinystories_slm.training.muon import Muon, newton_schulz

SHAPES = [(16, 16), (16, 40), (40, 16), (16, 16), (8, 40)]


def weights_after_steps(optimizer_type, *, steps: int = 4, **options) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    weights = [torch.randn(shape, generator=generator).requires_grad_() for shape in SHAPES]
    optimizer = optimizer_type(weights, lr=0.02, momentum=0.9, ns_steps=3, **options)
    for _ in range(steps):
        for weight in weights:
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
    return weights


def test_batched_muon_matches_torch_muon():
    expected = weights_after_steps(torch.optim.Muon, adjust_lr_fn="match_rms_adamw")
    initial = weights_after_steps(Muon, dtype=torch.bfloat16, steps=0)
    for before, one, other in zip(
        initial, expected, weights_after_steps(Muon, dtype=torch.bfloat16), strict=True
    ):
        moved = (one - before).norm()
        assert moved > 0.1
        assert (one - other).norm() < 0.02 * moved  # bfloat16, with another order of roundings
    for before, one, other in zip(
        initial, expected, weights_after_steps(Muon, dtype=torch.float32), strict=True
    ):
        assert (one - other).norm() < 0.02 * (one - before).norm()


def test_state_dict_loads_into_torch_muon():
    weight = torch.ones(4, 8).requires_grad_()
    weight.grad = torch.full((4, 8), 2.0)
    optimizer = Muon([weight], lr=0.1, momentum=0.9, dtype=torch.float32)
    optimizer.step()
    torch_muon = torch.optim.Muon([weight], lr=0.1, momentum=0.9, adjust_lr_fn="match_rms_adamw")
    assert optimizer.state_dict()["param_groups"] == torch_muon.state_dict()["param_groups"]
    torch_muon.load_state_dict(optimizer.state_dict())
    assert torch_muon.state[weight]["momentum_buffer"].unique().item() == pytest.approx(0.2)


def test_newton_schulz_moves_singular_values_near_one():
    matrices = torch.randn(3, 20, 50, generator=torch.Generator().manual_seed(0))
    coefficients = (3.4445, -4.7750, 2.0315)
    result = newton_schulz(matrices, coefficients=coefficients, steps=5, eps=1e-7)
    values = torch.linalg.svdvals(result)
    assert result.shape == matrices.shape
    assert values.min() > 0.5 and values.max() < 1.3  # the range for these coefficients


def test_matrix_without_gradient_is_unchanged():
    weights = [torch.ones(4, 8).requires_grad_() for _ in range(2)]
    weights[0].grad = torch.eye(4, 8)
    Muon(weights, lr=0.1, dtype=torch.float32).step()
    assert not weights[0].equal(torch.ones(4, 8))
    assert weights[1].equal(torch.ones(4, 8))
