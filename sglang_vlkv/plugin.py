"""The one door into SGLang, through which everything of this package is registered or nothing.

SGLang calls :func:`register` in every process, before arguments are parsed, and logs and swallows what it
raises. So what can be missing is looked for before anything is registered, and the scheduler checks once more
that it runs what was.
"""

from __future__ import annotations

import pkgutil
from functools import cache
from typing import Callable

from sglang_vlkv import compatibility


def register() -> None:
    """Entry point of group ``sglang.srt.plugins``; nothing but a warning beside an SGLang that does not fit.

    The hooks come last and cannot fail: without their flags nothing that was registered before them acts.
    """
    if not compatibility.fits(compatibility.PLUGIN):
        return
    from sglang.srt.entrypoints.engine import Engine
    from sglang.srt.plugins.hook_registry import HookRegistry, HookType

    from sglang_vlkv.options import arguments
    from sglang_vlkv.scheduler import wiring

    arguments.register_resolution()
    wiring.register_backends()
    # Engine's own override point. Not a REPLACE hook: that would replace ServerArgs everywhere.
    Engine.server_args_class = arguments.EngineServerArgs()
    for hook in compatibility.HOOKS:
        HookRegistry.register(hook.target, _lazy(hook.ours), HookType(hook.kind))


def _lazy(ours: str) -> Callable:
    """Calls ``module:name``, importing the module at the first call."""
    resolve = cache(lambda: pkgutil.resolve_name(ours))

    def call(*args, **kwargs):
        return resolve()(*args, **kwargs)

    call.__name__ = call.__qualname__ = ours.split(":")[1]
    return call
