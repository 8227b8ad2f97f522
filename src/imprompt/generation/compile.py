"""The base model's forward pass compiled whole: one graph, which no new prompt, scale, mask or seed
compiles again.

The hook that prepares image prompts (`imprompt.attention.injection`) stays outside the graph, which
so projects queries only. What was compiled is kept on the disk: a second start reads it.
"""

import functools
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException
from torch._inductor.runtime.cache_dir_utils import default_cache_dir
from torch.utils._pytree import tree_map_only

from imprompt.errors import SettingError
from imprompt.families.base import family_of
from imprompt.prompt import KEY

# a variable of PyTorch's; by default it is a folder of /tmp, lost at the next boot
CACHE = "TORCHINDUCTOR_CACHE_DIR"
GRAPHS = 64
MISSING = {  # what PyTorch says when it cannot compile here, and what to do
    "InvalidCxxCompiler": "a C++ compiler, and none was found: install g++",
    "CppCompileError": "a C++ compiler with Python's headers: install g++ and python3-dev",
    "TritonMissing": "Triton, and it is not installed: pip install triton",
}


def compile_base(model: nn.Module, **options: Any) -> None:
    """Compile the forward pass of `model` at its first call; `options` as for `torch.compile`.

    On a GPU it runs as CUDA graphs.

    Another size, batch or number of prompts is compiled anew, GRAPHS times at most; then it runs as
    it is. SettingError, at that call, where nothing can be compiled.
    """
    cache = (
        Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "imprompt" / "compiled"
    )
    if os.environ.get(CACHE) in (None, default_cache_dir()):  # PyTorch writes its own choice there
        os.environ[CACHE] = str(cache)
    graphs = next(model.parameters()).device.type == "cuda"
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, GRAPHS)
    forward: Any = model.forward
    family = family_of(model)
    latents = family.arguments[0]
    chosen: dict[str, Any] = ({"mode": "reduce-overhead"} if graphs else {}) | options
    run = torch.compile(forward, fullgraph=True, **chosen)

    @functools.wraps(forward)
    def compiled(*args: Any, **kwargs: Any) -> Any:
        if graphs:
            torch.compiler.cudagraph_mark_step_begin()
        channel = kwargs.get(family.channel) or {} if family.channel else {}
        if getattr(channel.get(KEY), "undecided", False):
            # the layers choose a kernel, which cannot be done while compiling
            return forward(*args, **kwargs)
        given = family.given(args, kwargs)
        # some pipelines lay it out otherwise: no new graph for that
        given[latents] = given[latents].contiguous()
        try:
            out = run(**given)
        except FailOnRecompileLimitHit:
            return forward(*args, **kwargs)
        except TorchDynamoException as error:
            if needed := MISSING.get(type(getattr(error, "inner_exception", None)).__name__):
                raise SettingError(f"compiling needs {needed}, or do not compile") from error
            raise
        # a graph's next run writes where its last one did
        return tree_map_only(Tensor, Tensor.clone, out) if graphs else out

    model.forward = compiled
