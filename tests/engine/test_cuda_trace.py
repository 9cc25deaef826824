"""Compiled steps have no graph breaks and do not synchronize, and their ops return the declared strides.

The steps distill a ResNet-34 into a ResNet-18 at 224 x 224, batch 64, bf16 and channels-last. They run on the fake CUDA
tensors of `benchmarks/step/fake_cuda.py`, without a GPU.
"""

from __future__ import annotations

import itertools
import re
import shutil
from ast import literal_eval
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from dfkd_fast.benchmarks import count
from dfkd_fast.benchmarks.step import fake_cuda
from dfkd_fast.report import read_results

pytestmark = [
    pytest.mark.skipif(shutil.which(fake_cuda.C_COMPILER) is None, reason="no C compiler"),
    pytest.mark.timeout(600),  # up to a minute each on an idle machine
]

GRAPHS = {
    *(
        f"generator_step.{region}.{direction}"
        for region in ("generator", "teacher", "student", "objective")
        for direction in ("forward", "backward")
    ),
    *(f"student_step.{region}.forward" for region in ("generator", "teacher", "student", "objective")),
    *(f"student_step.{region}.backward" for region in ("student", "objective")),
}
"""In student steps, generator and teacher have no backward."""

# The argument whose memory format each result has, as documented in dfkd_fast.ops; None means contiguous. New operators
# must be added here.
DECLARED: dict[str, tuple[str | None, ...]] = {
    "batch_norm_act": ("x", None, None, "mask"),
    "batch_norm_act_backward": ("x", None, None, "x"),
    "batch_norm_act_conv1x1": ("x", None, None),
    "batch_norm_act_conv1x1_backward": ("x", None, None, None, None),
    "batch_norm_act_sums": (None,),
    "batch_norm_act_synchronized": ("x", None, None, "mask"),
    "batch_norm_act_synchronized_backward": ("x", "x"),
    "batchnorm_statistics": ("x", None, None, "mask"),
    "batchnorm_statistics_backward": ("x", None, None, "x"),
    "batchnorm_statistics_merge": (None,),  # two for each layer
    "channel_statistics": (None, None),
    "channel_statistics_backward": ("x",),
    "contrastive_loss": (None, None),
    "contrastive_loss_backward": ("anchors", "positives"),
    "conv2d_act": ("x or weight",),
    "distillation_kl": (None, None),
    "distillation_kl_backward": ("a", "b"),
    "high_order_attention": ("x",),
    "high_order_attention_backward": ("x", None, None),
    "high_order_attention_mse": (None,),
    "high_order_attention_mse_backward": ("x", None, None),
    "max_pool2x2": ("x", "x"),
    "max_unpool2x2": ("code",),
    "max_unpool2x2_backward": ("code",),
    "spatial_attention": ("features", None),
    "spatial_attention_backward": ("features", "hidden", None, None),
    "statistics_distance": (None, None),
    "statistics_distance_backward": ("x",),
    "statistics_distances": (None, None),
}


def is_dense(x: dict[str, Any], order: tuple[int, ...]) -> bool:
    """Whether a tensor is dense with its dimensions in this order, innermost first."""
    expected = 1
    for dim in order:
        if x["shape"][dim] not in (1, 0) and x["stride"][dim] != expected:
            return False
        expected *= x["shape"][dim]
    return True


def is_channels_last(x: dict[str, Any]) -> bool:
    return len(x["shape"]) == 4 and is_dense(x, (1, 3, 2, 0))


def is_contiguous(x: dict[str, Any]) -> bool:
    return is_dense(x, tuple(range(len(x["shape"])))[::-1])


def strides_as_declared(call: dict[str, Any]) -> list[bool]:
    """Whether each result of a call has the declared strides."""
    found = []
    declared = DECLARED[call["op"]]
    if "needs_grad" in call["arguments"]:  # the operator returns only the gradients that are needed
        declared = tuple(itertools.compress(declared, (need == "True" for need in call["arguments"]["needs_grad"])))
    if call["op"] == "batchnorm_statistics_merge":
        declared *= len(call["results"])
    for like, result in zip(declared, call["results"], strict=True):
        if like == "mask":  # (N, channel octets, positions), dense with channels innermost, like x
            found.append(is_channels_last(call["arguments"]["x"]) and is_dense(result, (1, 2, 0)))
            continue
        tensors = [call["arguments"][name] for name in (like or "").split(" or ") if name]
        maps = 0 not in result["shape"] and any(is_channels_last(each) for each in tensors)
        found.append((is_channels_last if maps else is_contiguous)(result))
    return found


def require_whole_graphs(report: dict[str, Any]) -> None:
    """Require one graph per region, and no further graph in the second round of steps."""
    assert report["error"] is None, report["error"]
    assert report["graph_breaks"] == {}
    assert report["regions"] == 8
    assert set(report["graphs"]) == GRAPHS


def require_no_synchronization(report: dict[str, Any]) -> None:
    for step, found in report["synchronizations"].items():
        assert found == [], f"synchronization in {step}"
    for name, graph in report["graphs"].items():
        assert graph["synchronizations"] == [], f"synchronization in {name}"


def require_declared_strides(report: dict[str, Any]) -> None:
    for name, graph in report["graphs"].items():
        for call in graph["calls"]:
            for argument, value in call["arguments"].items():
                # The gradient of the average pooling before the classifier is contiguous.
                pooled = argument == "grad_y" and isinstance(value, dict) and value["shape"][2:] == [7, 7]
                if isinstance(value, dict) and len(value["shape"]) == 4 and not pooled:
                    assert is_channels_last(value), f"{argument} of {call['op']} in {name}"
            assert all(strides_as_declared(call)), f"results of {call['op']} in {name}: {call['results']}"


RESULT = re.compile(r"assert_size_stride\(\w+, (\(.*?\)), (\(.*?\)), 'torch\.ops\.dfkd_fast\.(\w+)\.default'\)")


def require_asserted_strides(report: dict[str, Any]) -> None:
    """Require that the generated code asserts the strides that the graphs declare."""
    for name, graph in report["graphs"].items():
        kernels = Counter(kernel["source"] for kernel in graph["kernels"])
        assert kernels["inductor"] == len(re.findall(r"\btriton_\w+\.run\(", graph["code"])) > 0, name
        declared = Counter(
            (call["op"], tuple(result["shape"]), tuple(result["stride"]))
            for call in graph["calls"]
            for result in call["results"]
        )
        asserted = Counter(
            (op, literal_eval(shape), literal_eval(strides)) for shape, strides, op in RESULT.findall(graph["code"])
        )
        assert {op for op, *_ in asserted} == {call["op"] for call in graph["calls"]}, name
        assert asserted <= declared, name  # Inductor does not assert unused results


def test_dfkd_fast_has_whole_graphs_declared_strides_and_committed_counts(repository: Path) -> None:
    report = fake_cuda.trace("dfkd_fast", code=True)["dfkd_fast"]
    require_whole_graphs(report)
    require_no_synchronization(report)
    require_declared_strides(report)
    require_asserted_strides(report)
    # The ResNets have 36 and 20 BatchNorms and 4 stages, the generator has 21 BatchNorms and 4 blocks. Two forwards of
    # each trained network run in a round, but only one backward of the generator.
    calls = Counter(call["op"] for graph in report["graphs"].values() for call in graph["calls"])
    assert calls == {
        **{"batchnorm_statistics": 36, "batchnorm_statistics_backward": 36},
        "conv2d_act": 33,  # all ReLUs of the teacher in student steps
        **{"batchnorm_statistics_merge": 1, "statistics_distances": 1},
        **{"spatial_attention": 8, "spatial_attention_backward": 4},
        **{"batch_norm_act_conv1x1": 8, "batch_norm_act_conv1x1_backward": 4},
        **{"batch_norm_act": 74, "batch_norm_act_backward": 57},
        **{"max_pool2x2": 8, "max_unpool2x2": 12, "max_unpool2x2_backward": 4},
        **{"high_order_attention": 4, "high_order_attention_mse": 4, "high_order_attention_mse_backward": 4},
        **{"contrastive_loss": 1, "contrastive_loss_backward": 1},
        **{"distillation_kl": 2, "distillation_kl_backward": 2},
    }
    content = read_results(repository / "benchmarks" / "results" / "counted" / "step_counts.json")
    assert content is not None
    committed = {row["step"]: row for row in content["rows"] if row["variant"] == "dfkd_fast"}
    for row in count.step_rows("dfkd_fast", report, None):
        before, why = committed[row["step"]], f"{row['step']}; if intended, run dfkd-fast bench --count"
        assert row["launches"] <= before["launches"], why
        assert row["bytes_read"] + row["bytes_written"] <= before["bytes_read"] + before["bytes_written"], why


# Operators in the steps of each method besides those of the networks.
METHODS = {
    # two stages, and in each a distance of the first layer, which has another weight
    "adi": {"batchnorm_statistics": 18, "statistics_distances": 4},
    "zskd": {},
    "cmi": {"batchnorm_statistics": 9, "statistics_distances": 1, "contrastive_loss": 1, "distillation_kl": 2},
    "fast": {"batchnorm_statistics": 9, "statistics_distances": 1, "distillation_kl": 2},
    "nayer": {"batchnorm_statistics": 9, "statistics_distances": 1, "distillation_kl": 2},
    "mad": {"batchnorm_statistics": 9, "statistics_distances": 1, "distillation_kl": 2},
}


@pytest.mark.parametrize(
    "methods", [("cmi",), pytest.param(("adi", "zskd", "fast", "nayer", "mad"), marks=pytest.mark.slow)]
)
def test_steps_of_other_methods_have_whole_graphs_with_the_ops_of_their_losses(methods: tuple[str, ...]) -> None:
    assert {"adi", "cmi", "zskd", "fast", "nayer", "mad"} == set(METHODS)
    for name, report in fake_cuda.trace(*(f"methods:{method}" for method in methods)).items():
        assert report["error"] is None, f"{name}: {report['error']}"
        assert (report["graph_breaks"], len(report["graphs"])) == ({}, 2 * report["regions"] - 2), name
        require_no_synchronization(report)
        made = [call for graph in report["graphs"].values() for call in graph["calls"]]
        assert all(all(strides_as_declared(call)) for call in made), name
        calls = Counter(call["op"] for call in made)
        expected = METHODS[name.removeprefix("methods:")]
        losses = ("batchnorm_statistics", "statistics_distances", "contrastive_loss", "distillation_kl")
        found = {op: count for op, count in calls.items() if op in losses}
        assert found == {"distillation_kl": 1} | expected, name


@pytest.mark.slow
def test_steps_of_several_processes_have_whole_graphs_with_collectives() -> None:
    report = fake_cuda.trace("distributed")["distributed"]
    require_whole_graphs(report)
    require_no_synchronization(report)
    assert all(all(strides_as_declared(call)) for graph in report["graphs"].values() for call in graph["calls"])
    gathered, reduced = "all_gather_into_tensor.default", "all_reduce.default"
    norms = {"generator": 21, "student": 9}  # of the small size
    for name, graph in report["graphs"].items():
        _, region, direction = name.split(".")
        expected = [gathered if direction == "forward" else reduced] * norms.get(region, 0)
        if region == "objective" and direction == "forward":
            expected = [gathered]  # the statistics of L_BN, or the vectors of L_SFCL
        assert graph["collectives"] == expected, name
    # Outside of the graphs, gradients and losses are averaged.
    assert all(found == [reduced] for found in report["collectives"].values())


@pytest.mark.slow
def test_compiled_baseline_has_whole_graphs_of_plain_pytorch() -> None:
    report = fake_cuda.trace("compile")["compile"]
    require_whole_graphs(report)
    require_no_synchronization(report)
    assert [call for graph in report["graphs"].values() for call in graph["calls"]] == []


def test_peer_synchronizes_only_to_read_its_loss() -> None:
    report = fake_cuda.trace("peer")["peer"]
    assert report["error"] is None, report["error"]
    assert len(report["synchronizations"]) == 4
    for step, found in report["synchronizations"].items():
        assert found == ["aten._local_scalar_dense.default"], step


@pytest.mark.slow
def test_injected_faults_are_detected() -> None:
    reports = fake_cuda.trace("graph_break", "other_faults")
    with pytest.raises(AssertionError, match=r"Unsupported: Call to .*graph_break"):
        require_whole_graphs(reports["graph_break"])
    faulty = reports["other_faults"]
    with pytest.raises(AssertionError, match="RecompileError: Recompiling function region_generator"):
        require_whole_graphs(faulty)
    with pytest.raises(AssertionError, match="synchronization in generator_step"):
        require_no_synchronization(faulty)
    found = faulty["synchronizations"]["generator_step"]
    assert found == ["aten._local_scalar_dense.default", "aten._to_copy.default"]
    with pytest.raises(AssertionError, match=r"results of batchnorm_statistics in generator_step\.teacher\.forward"):
        require_declared_strides(faulty)


@pytest.mark.slow
def test_generated_code_of_the_compiled_baseline() -> None:
    report = fake_cuda.trace("compile", code=True)["compile"]
    require_whole_graphs(report)
    require_asserted_strides(report)
