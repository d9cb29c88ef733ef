"""The disk tier."""

from tolserve.tol.disk.reads import Read, ReadRequest
from tolserve.tol.disk.source import READ_DEPTH, DiskSource

__all__ = ["READ_DEPTH", "DiskSource", "Read", "ReadRequest"]
