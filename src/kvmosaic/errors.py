"""What can go wrong by a user's hand. Each message says what was asked, what came, and what to do."""


class RecipeConflict(ValueError):
    """Two recipes joined with | set the same axis."""


class UnsupportedModel(ValueError):
    """A model whose attention cannot read a compressed cache."""


class CacheMismatch(ValueError):
    """A cache meets a model, a batch, a device or a mask that it was not made for."""


class CacheInUse(RuntimeError):
    """Two generations write to one cache at the same time."""


class CannotRollBack(RuntimeError):
    """Tokens that are already encoded cannot be taken back."""


class NotFinite(ValueError):
    """Keys or values hold NaN or infinity, so no range can be fitted to them."""


class BadCalibration(ValueError):
    """A calibration file that is damaged, or made for another model or method."""


class NeedsCalibration(ValueError):
    """A method that learns from data, used without what it learned."""


class BadCheckpoint(ValueError):
    """A checkpoint that is missing, incomplete or damaged."""


class BadPicture(ValueError):
    """A picture that cannot be read, or a picture for a model that takes none."""
