# SPDX-License-Identifier: Apache-2.0
"""Images to search on: scattered digits, which need no download, or folders of the user's own."""

from search.data.digits import ScatteredDigits
from search.data.folder import FolderImages
from search.data.loader import build_loader

__all__ = ["FolderImages", "ScatteredDigits", "build_loader"]
