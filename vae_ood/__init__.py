"""vae-ood: does this image belong to the data that the model was trained on?"""

import os

# vae_ood.kernels lies in this folder where it is installed, and beside it in the repository. Plain `kernels` is what
# another package is called.
if not os.path.isdir(os.path.join(__path__[0], "kernels")):
    __path__.append(os.path.dirname(__path__[0]))

__all__ = ["Detector", "UserError"]


class UserError(Exception):
    """A mistake that the user can mend: its message is one line that says what is wrong and what to do."""


def __getattr__(name):
    if name == "Detector":  # when it is asked for: it imports torch
        from vae_ood.detector import Detector
        return Detector
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
