"""What kind of work an activity is: one of the project's ops, a convolution, a fused element-wise kernel, ..."""

from __future__ import annotations

import ast
import functools
import re
from importlib import resources

from dfkd_fast import ops
from dfkd_fast.profiling.timeline import Activity

__all__ = ["GAP", "OURS", "kernel_ops", "op_class"]

GAP = "gap"
"""Class of the time in which nothing ran."""

OURS = "dfkd_fast kernel"
"""Class of a kernel of the project whose name several ops share, launched out of sight of any range or operator."""

_SHARED = ("common", "config", "__init__")  # files of kernels/ that belong to no op

# What a kernel's name says for certain, whatever launched it. The first that is found counts.
_CERTAIN = {
    "convolution": r"triton_tem_\w*conv",
    "matrix product": r"triton_tem_",
    "fused element-wise": r"^triton_(poi|for)_",
    "fused reduction": r"^triton_(red|per|mix|spl)_",
    "random numbers": r"distribution_elementwise|philox|curand|random_from_to",
    "optimizer": r"multi_tensor|Fused(Adam|Sgd)|fused_(adam|sgd)",
    "batch norm": r"batch_norm|cudnn::bn_|bn_(fw|bw)_",
    "copy": r"^Mem(cpy|set)|nchwToNhwc|nhwcToNchw|nchw2nhwc|nhwc2nchw",
    "convolution ": r"implicit_(gemm|convolve)|fprop|dgrad|wgrad|winograd|conv(2d|olve|olution)|conv_depthwise",
}

# The host operator that launched it, the innermost first.
_OPERATORS = {
    "convolution": r"aten::\w*conv(olution|_transpose|_depthwise|\dd)\w*",
    "matrix product": r"aten::(\w*addmm\w*|mm|bmm|baddbmm|matmul|linear|linear_backward|addmv_?|mv|dot|addr)",
    "batch norm": r"aten::\w*batch_norm\w*",
    "optimizer": r"aten::_(fused|foreach)_\w+",
    "random numbers": r"aten::(rand\w*|normal_?|uniform_|bernoulli_?|native_dropout)",
    "copy": r"aten::(copy_|_to_copy|to|clone|contiguous|cat|stack|fill_|zero_|index_copy_?|constant_pad_nd)",
    "pooling": r"aten::\w*pool\w*",
    "reduction": r"aten::(sum|mean|var|var_mean|std|norm|linalg_vector_norm|amax|max|argmax|logsumexp|all|any)"
    r"|aten::_(log_)?softmax\w*",
    "element-wise": r"aten::(add|sub|rsub|mul|div|neg|pow|square|sqrt|rsqrt|exp|log|reciprocal|relu|sigmoid|tanh"
    r"|leaky_relu|clamp|clamp_min|threshold|where|eq|ne|lt|gt|le|ge|bitwise_\w+|logical_\w+|isfinite|abs)(_|_backward)?",
    "compiled code": r"## Call CompiledFxGraph .*",
    "host bookkeeping": r"autograd::engine::.*|\w+Backward\d*|torch::autograd::\w+|CompiledFunction\w*|TorchDynamo .*"
    r"|Torch-Compiled Region.*|Pregraph bytecode|AOTDispatcher .*",
}

# What a kernel's name suggests where nothing else is known.
_LIKELY = {
    "matrix product": r"gemm|gemv|cublas|nvjet|cutlass|splitK",
    "pooling": r"pool",
    "copy": r"direct_copy|CatArray|FillFunctor|copy_kernel",
    "reduction": r"reduce_kernel|softmax|SoftMax",
    "element-wise": r"elementwise",
}

_COMPILED = {
    name: [(label.strip(), re.compile(pattern)) for label, pattern in table.items()]
    for name, table in (("certain", _CERTAIN), ("operators", _OPERATORS), ("likely", _LIKELY))
}


@functools.cache
def kernel_ops() -> dict[str, frozenset[str]]:
    """The ops that each Triton kernel of the project belongs to, by the kernel's name; none for a shared one.

    Read from the sources in ``kernels/``: an op's kernels are the ``triton.jit`` functions of the files that carry its
    name. A name can stand in the files of several ops, and an op can launch the kernels of another.
    """
    found: dict[str, set[str]] = {}
    for file in resources.files("dfkd_fast.kernels").iterdir():
        stem = file.name.removesuffix(".py")
        if stem == file.name:
            continue
        op = re.sub(r"_(fwd|bwd)$", "", stem)
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.FunctionDef) and any("triton.jit" in ast.unparse(d) for d in node.decorator_list):
                found.setdefault(node.name, set()).update(() if op in _SHARED else (op,))
    return {name: frozenset(owners) for name, owners in found.items()}


def op_class(activity: Activity) -> str:
    """The class of an activity.

    What is said first counts: an op range; an operator of the project around it (``dfkd_fast::...``, which compiled
    code calls too); the name of one of the project's kernels; a name that leaves no doubt; the innermost telling host
    operator; a name that suggests something; ``other``.
    """
    return activity.op or _class(activity.name, activity.operators)


@functools.cache
def _class(name: str, operators: tuple[str, ...]) -> str:
    for operator in operators:
        if operator.startswith("dfkd_fast::"):
            own = operator.removeprefix("dfkd_fast::")  # the op's, or with a suffix; one op's name can begin another's
            return max((op for op in ops.backends() if own.startswith(op)), key=len, default=OURS)
    owners = kernel_ops().get(name)
    if owners is not None:
        return next(iter(owners)) if len(owners) == 1 else OURS
    for label, pattern in _COMPILED["certain"]:
        if pattern.search(name) and name not in operators:  # on the CPU the name is that of an operator
            return label
    for operator in operators:
        for label, pattern in _COMPILED["operators"]:
            if pattern.fullmatch(operator):
                return label
    return next((label for label, pattern in _COMPILED["likely"] if pattern.search(name)), "other")
