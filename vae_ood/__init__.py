"""vae-ood: does this image belong to the data that the model was trained on?"""


class UserError(Exception):
    """A mistake that the user can mend: its message is one line that says what is wrong and what to do."""
