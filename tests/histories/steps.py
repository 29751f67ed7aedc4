"""All steps of histories, registered by importing them."""

from . import hand_steps, other_steps, package_steps
from .subject import ACTIONS, PACKAGE_CALLS, Subject

__all__ = ["ACTIONS", "PACKAGE_CALLS", "Subject", "hand_steps", "other_steps", "package_steps"]
