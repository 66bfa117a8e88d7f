"""The errors that fxaccel raises, each one sentence with what was expected, what came, and a hint."""

from __future__ import annotations


class FxaccelError(Exception):
    """Base of every error that fxaccel raises on purpose."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        self.message, self.hint = message, hint
        super().__init__(message if hint is None else f"{message}\nhint: {hint}")

    def __reduce__(self) -> tuple[type[FxaccelError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)


class CaptureError(FxaccelError):
    """The model cannot be captured as a graph; names the user's own line where one is known."""


class OptionError(FxaccelError):
    """An argument or option of the public interface is wrong."""


class RuleError(FxaccelError):
    """A rule or pass broke its contract: a defect of the pass, never of the user's model."""


class ProofError(FxaccelError):
    """A rewrite was run beside the original and computed something else."""


class ArtifactError(FxaccelError):
    """A saved file is damaged, truncated, foreign, or of a version that is not readable here."""


class StageError(FxaccelError):
    """A stage of a pipeline has failed, in this process or in another one; names it."""
