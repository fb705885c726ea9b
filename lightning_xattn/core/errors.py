"""The few kinds of error that the library raises on purpose."""

from __future__ import annotations

from typing import Any


class XAttnError(Exception):
    """Base of every error raised on purpose: catch this one to catch them all.

    Examples
    --------
    >>> try:
    ...     Direction.parse("eeg")
    ... except XAttnError as error:
    ...     print(error)
    A direction is named '<query>_to_<key>' after two different modalities, ...; got 'eeg'.
    """

    def __str__(self) -> str:
        from lightning_xattn.core.ids import clean  # here, as that file raises these errors

        # Names from data are in it, and it ends in a terminal.
        return clean(super().__str__())


class SettingError(XAttnError, ValueError):
    """A setting has a value that is not allowed; the message lists what is."""


class DiscoveryError(XAttnError):
    """The attention, the predictions or the targets were not found where they were looked for."""


class ShapeError(XAttnError, ValueError):
    """Tensors that belong together do not fit each other."""


class DataError(XAttnError, ValueError):
    """A recording, a table or a batch does not hold what it should."""


class XAttnWarning(UserWarning):
    """Something that does not stop a run but that its user should act on.

    Examples
    --------
    >>> import warnings
    >>> warnings.simplefilter("error", XAttnWarning)  # as in a test
    """


def check_whole_number(name: str, number: Any, least: int = 1, optional: bool = False) -> None:
    """Refuse a setting that is no whole number of at least this much, with a SettingError; None may be allowed too."""
    if optional and number is None:
        return
    if not isinstance(number, int) or isinstance(number, bool) or number < least:
        raise SettingError(f"{name} must be a whole number >= {least}; got {number!r}.")
