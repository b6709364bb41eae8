"""vae-ood: does this image belong to the data that the model was trained on?"""

__all__ = ["Detector", "UserError"]


class UserError(Exception):
    """A mistake that the user can mend: its message is one line that says what is wrong and what to do."""


def __getattr__(name):
    if name == "Detector":  # when it is asked for: it imports torch
        from vae_ood.detector import Detector
        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
