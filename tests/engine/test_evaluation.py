"""Measures of predictions against their definitions in float64, and the cost of known networks."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset
from torchmetrics.functional.classification import multiclass_calibration_error, multiclass_confusion_matrix

from dfkd_fast.engine import Predictions, Runtime, cost, evaluate, measure, predictions
from dfkd_fast.models import Outputs
from tests import tiny


def made(logits: list[list[float]] | Tensor, labels: list[int] | Tensor) -> Predictions:
    return Predictions(logits=torch.as_tensor(logits).float(), labels=torch.as_tensor(labels), seconds=1.0)


def of_probabilities(rows: list[list[float]], labels: list[int]) -> Predictions:
    return made(torch.tensor(rows, dtype=torch.float64).log(), labels)


def drawn(count: int = 400, classes: int = 8, seed: int = 0) -> Predictions:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(classes, (count,), generator=generator)
    logits = 2 * torch.randn(count, classes, generator=generator)
    logits[torch.arange(count), labels] += 1.5
    return made(logits, labels)


def probabilities(logits: Tensor) -> np.ndarray:
    exponentials = np.exp(logits.double().numpy())
    return exponentials / exponentials.sum(1, keepdims=True)


def test_accuracies_per_class_and_confused_pairs() -> None:
    """Class 2 has no images; 0 is predicted as 3 three times, 1 as 0 twice, and two pairs occur once."""
    labels = [0, 0, 0, 0, 1, 1, 1, 3, 4, 4]
    predicted = [3, 3, 3, 0, 0, 0, 1, 3, 1, 2]
    found = measure(made(nn.functional.one_hot(torch.tensor(predicted), 5), labels))
    assert found.confused == [(0, 3, 3), (1, 0, 2), (4, 1, 1), (4, 2, 1)]
    assert found.per_class == [1 / 4, 1 / 3, None, 1.0, 0.0]
    assert found.counts == [4, 3, 0, 1, 2]
    assert (found.top1, found.top5, found.images, found.not_finite) == (0.3, None, 10, 0)
    assert (found.agreement, found.kl) == (None, None)


def test_measures_match_torchmetrics_and_evaluate() -> None:
    data = drawn()
    found = measure(data)

    class Known(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, x: Tensor) -> Outputs:
            logits = data.logits[x[:, 0, 0, 0].long()]
            return Outputs(logits=logits, features=(), penultimate=logits)

    numbered = TensorDataset(torch.arange(400.0)[:, None, None, None].expand(-1, 3, 1, 1), data.labels)
    again = predictions(Known(), numbered, num_classes=8, batch_size=150)
    assert torch.equal(again.logits, data.logits)
    assert torch.equal(again.labels, data.labels)
    assert again.seconds > 0
    result = evaluate(Known(), numbered, num_classes=8)
    assert (found.top1, found.top5) == (pytest.approx(result.top1), pytest.approx(result.top5))

    matrix = multiclass_confusion_matrix(data.logits, data.labels, 8)
    assert found.counts == matrix.sum(1).tolist()
    assert found.per_class == pytest.approx((matrix.diag() / matrix.sum(1)).tolist())
    assert found.confused == sorted(found.confused, key=lambda each: -each[2])
    assert all(matrix[label, predicted] == count for label, predicted, count in found.confused)
    off_diagonal = matrix - torch.diag(matrix.diag())
    assert [each[2] for each in found.confused] == off_diagonal.flatten().sort(descending=True).values[:20].tolist()
    library = multiclass_calibration_error(data.logits.double().softmax(1), data.labels, 8, n_bins=15)
    assert found.ece == pytest.approx(library.item(), abs=1e-7)


def test_calibration_error_of_bins_by_hand() -> None:
    """Confidences just below 9/15, 0.62 (wrong), and 0.9 twice (one wrong): bins 8, 9 and 13."""
    rows = [[0.6 - 1e-6, 0.4 + 1e-6], [0.62, 0.38], [0.9, 0.1], [0.9, 0.1]]
    found = measure(of_probabilities(rows, [0, 1, 0, 1]))
    filled = {index: row for index, row in enumerate(found.reliability) if row[2]}
    assert filled == {
        8: (pytest.approx(0.6, abs=1e-5), 1.0, 1),
        9: (pytest.approx(0.62, abs=1e-6), 0.0, 1),
        13: (pytest.approx(0.9, abs=1e-6), 0.5, 2),
    }
    assert found.ece == pytest.approx((0.4 + 0.62 + 2 * 0.4) / 4, abs=1e-5)
    assert all(row == (None, None, 0) for index, row in enumerate(found.reliability) if index not in filled)


@pytest.mark.parametrize(("classes", "index"), [(15, 0), (5, 2), (3, 4), (1, 14)])
def test_a_confidence_on_an_edge_belongs_to_the_lower_bin(classes: int, index: int) -> None:
    """Equal logits give 1 / classes, and the first class is predicted; one image of two is right."""
    found = measure(made(torch.zeros(2, classes), [0, classes - 1]))
    assert [row[2] for row in found.reliability] == [2 * (each == index) for each in range(15)]
    accuracy = 0.5 if classes > 1 else 1.0
    assert found.reliability[index] == (pytest.approx(1 / classes), accuracy, 2)
    assert found.ece == pytest.approx(abs(accuracy - 1 / classes))


def test_saturated_probabilities_are_in_the_last_bin() -> None:
    """Confidences of 1 and 0.97 share a bin: their shifts cancel to |0.985 - 0.5|, not (1 + 0.03) / 2."""
    found = measure(made([[1000.0, 0.0], [math.log(0.97 / 0.03), 0.0]], [1, 0]))
    assert found.reliability[14] == (pytest.approx(0.985), 0.5, 2)
    assert found.ece == pytest.approx(0.485)


def test_ties_go_to_the_first_class() -> None:
    found = measure(made(torch.zeros(7, 7), torch.arange(7)))
    assert found.per_class == [1.0, 0, 0, 0, 0, 0, 0]
    assert (found.top1, found.top5) == (pytest.approx(1 / 7), pytest.approx(5 / 7))
    assert found.confused == [(label, 0, 1) for label in range(1, 7)]


def test_one_class_present() -> None:
    found = measure(made(10 * torch.eye(4)[[2, 2, 0]], [2, 2, 2]))
    assert found.per_class == [None, None, pytest.approx(2 / 3), None]
    assert found.confused == [(2, 0, 1)]
    assert measure(made(10 * torch.eye(4)[[2]], [2])).confused == []


def test_agreement_and_kl_match_float64() -> None:
    student, teacher = drawn(), drawn()
    generator = torch.Generator().manual_seed(1)
    teacher = made(student.logits + torch.randn(400, 8, generator=generator), student.labels)
    found = measure(student, teacher=teacher)
    p, q = probabilities(teacher.logits), probabilities(student.logits)
    assert found.kl == pytest.approx((p * (np.log(p) - np.log(q))).sum(1).mean(), rel=1e-9)
    assert found.agreement == (p.argmax(1) == q.argmax(1)).mean()
    assert 0.5 < found.agreement < 1
    itself = measure(student, teacher=student)
    assert (itself.agreement, itself.kl) == (1.0, 0.0)


def test_kl_by_hand_and_with_masked_classes() -> None:
    student = of_probabilities([[0.5, 0.25, 0.25]], [0])
    found = measure(student, teacher=of_probabilities([[0.25, 0.75, 0]], [0]))  # the teacher masks class 2
    assert found.kl == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(3), abs=1e-6)
    assert found.agreement == 0
    assert measure(of_probabilities([[0.5, 0.5, 0]], [0]), teacher=student).kl == math.inf


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_do_not_spread(value: float, caplog: pytest.LogCaptureFixture) -> None:
    """The student's images 0 to 2 and the teacher's image 3 are broken."""
    student, teacher = drawn(20), drawn(20)
    teacher.logits[:, 0] += 1
    rest = measure(made(student.logits[4:], student.labels[4:]), teacher=made(teacher.logits[4:], teacher.labels[4:]))
    finite = measure(made(student.logits[3:], student.labels[3:]))
    student.logits[:3] = value
    teacher.logits[3] = value
    found = measure(student, teacher=teacher)
    assert "3 of 20 images have logits that are not finite; they count as wrong" in caplog.text
    assert found.not_finite == 3
    assert found.top1 == pytest.approx(finite.top1 * 17 / 20)
    assert finite.top5 is not None
    assert found.top5 == pytest.approx(finite.top5 * 17 / 20)
    assert sum(found.counts) == 20
    assert (found.ece, found.reliability, found.confused) == (finite.ece, finite.reliability, finite.confused)
    assert rest.kl == found.kl
    assert rest.agreement is not None
    assert found.agreement == pytest.approx(rest.agreement * 16 / 20)

    student.logits[:] = value
    found = measure(student, teacher=teacher)
    assert (found.top1, found.top5, found.agreement, found.confused) == (0, 0, 0, [])
    assert math.isnan(found.ece)
    assert math.isnan(found.kl or 0)


def test_wrong_arguments_raise() -> None:
    data, images = drawn(6), torch.zeros(6, 3, 16, 16)
    for other in (drawn(5), drawn(6, classes=9), made(data.logits, (data.labels + 1) % 8)):
        with pytest.raises(ValueError, match="teacher must have logits for the same images and classes"):
            measure(data, teacher=other)
    model = tiny.network()
    with pytest.raises(ValueError, match="at least one image"):
        predictions(model, TensorDataset(images[:0], data.labels[:0]), num_classes=5)
    with pytest.raises(ValueError, match=r"logits must have shape \(6, 4\), got \(6, 5\)"):
        predictions(model, TensorDataset(images, data.labels), num_classes=4)
    with pytest.raises(ValueError, match=r"labels must be in 0..4, got 0..5"):
        predictions(model, TensorDataset(images, torch.arange(6)), num_classes=5)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_predictions_are_float32(precision: str) -> None:
    model = tiny.network()
    runtime = Runtime.of("cpu", precision, channels_last=True)  # type: ignore[arg-type]
    found = predictions(runtime.place(model), tiny.data().test, num_classes=tiny.CLASSES, runtime=runtime)
    assert found.logits.dtype == torch.float32
    exact = predictions(model, tiny.data().test, num_classes=tiny.CLASSES).logits
    assert not torch.equal(found.logits, exact)
    torch.testing.assert_close(found.logits, exact, rtol=0.05, atol=0.05)
    assert model.training


def test_flops_and_parameters_of_a_small_network() -> None:
    """8 channels of 3 x 3 x 3 at 16 x 16 places; 4 groups of 2 x 3 x 3 at 8 x 8; and a linear layer of 8 inputs."""
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=4, bias=False),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 10),
    )
    for precision in ("fp32", "bf16"):
        found = cost(model, 16, Runtime.of("cpu", precision, channels_last=False))  # type: ignore[arg-type]
        assert found.flops == 2 * (16 * 16 * 8 * 27 + 8 * 8 * 8 * 18 + 8 * 10)
        assert found.parameters == (8 * 27 + 8) + 2 * 8 + 8 * 18 + (80 + 10)
        assert found.latency_ms > 0
        assert found.batch_ms_per_image > 0
        assert found.peak_bytes is None
    assert model.training


def test_flops_of_attention_do_not_depend_on_fused_kernels() -> None:
    """Two heads over 16 patches of width 8: four projections, two products of attention and two of the MLP."""

    class Patches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.TransformerEncoderLayer(8, 2, 32, batch_first=True)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x[:, 0, :8].reshape(len(x), 16, 8)).mean(1)

    found = cost(Patches(), 16, Runtime.of("cpu", "fp32", channels_last=False))
    assert found.flops == 2 * 16 * (4 * 8 * 8 + 2 * 16 * 8 + 2 * 8 * 32)
    assert torch.backends.mha.get_fastpath_enabled()


@pytest.mark.gpu
def test_measures_on_a_gpu() -> None:
    model, images = tiny.network(), tiny.data().test
    exact = predictions(model, images, num_classes=tiny.CLASSES)
    flops = cost(model, tiny.SIZE, Runtime.of("cpu", "fp32", channels_last=True)).flops
    runtime = Runtime.of("cuda", "fp32", channels_last=True)
    found = predictions(runtime.place(model), images, num_classes=tiny.CLASSES, runtime=runtime)
    assert found.logits.device.type == found.labels.device.type == "cpu"
    torch.testing.assert_close(found.logits, exact.logits, rtol=1e-4, atol=1e-4)
    spent = cost(model, tiny.SIZE, runtime)
    assert spent.flops == flops
    assert 0 < spent.batch_ms_per_image < spent.latency_ms
    assert spent.peak_bytes is not None
    assert spent.peak_bytes > 4 * (spent.parameters + 64 * 3 * tiny.SIZE**2)
