"""The prompt methods: the parameters that each of them trains, and their initial values."""

from collections.abc import Callable

from orchestrator.job.space import TrialSpec
from orchestrator.job.spec import MethodName
from orchestrator.tuning.prompts.base import Method, Prompt
from orchestrator.tuning.prompts.inits import InitContext
from orchestrator.tuning.prompts.p_tuning import EncodedPrompt
from orchestrator.tuning.prompts.prefix import Prefix
from orchestrator.tuning.prompts.soft import SoftPrompt

METHODS: dict[MethodName, Callable[[Method, TrialSpec, InitContext], Prompt]] = {
    "prompt_tuning": SoftPrompt.create,
    "prefix_tuning": Prefix.create,
    "p_tuning": EncodedPrompt.create,
}


def make_prompt(method: Method, spec: TrialSpec, context: InitContext) -> Prompt:
    """Create a trial's prompt before its first step, on the CPU.

    Random values depend on the spec and its seed alone.
    """
    return METHODS[method.name](method, spec, context)


__all__ = ["METHODS", "InitContext", "Method", "Prompt", "make_prompt"]
