"""The one error that a command turns into a line on the terminal and a non-zero status."""


class CarouselError(Exception):
    """Something that the user can mend. The message says what is wrong and what to do; its first line stands alone."""
