"""Installed versions of flash-attn."""

import re
from functools import lru_cache
from importlib import metadata
from importlib.util import find_spec
from typing import NamedTuple


class Package(NamedTuple):
    """A distribution of flash-attn whose functions have the arguments that are passed here."""

    name: str
    module: str  # another distribution may lack it under the same name, or have it under another
    since: tuple[int, int]
    prereleases: bool = False

    def missing(self) -> str | None:
        """Return why the package is not used, or None."""
        try:
            version = metadata.version(self.name)
        except metadata.PackageNotFoundError:
            return f"{self.name} is not installed"
        found = re.match(r"(\d+)\.(\d+)[.\d]*(\.?(?:a|b|rc|alpha|beta)\d+)?", version)
        numbers = (int(found[1]), int(found[2])) if found else (0, 0)
        early = found is not None and found[3] is not None and not self.prereleases
        if early or not self.since <= numbers < (self.since[0] + 1, 0):
            least = ".".join(map(str, self.since))
            return f"{self.name} {version} is installed; needs {least} or later, below {self.since[0] + 1}"
        parent = self.module.partition(".")[0]
        if find_spec(parent) is None or find_spec(self.module) is None:
            return f"{self.name} {version} has no module {self.module}"
        return None


_PACKAGES = {
    # Older versions pad the log-sum-exp and take other arguments.
    2: Package("flash-attn", "flash_attn.flash_attn_interface", (2, 7)),
    # Prereleases of version 3 take other arguments; all releases of version 4 so far are prereleases.
    3: Package("flash-attn-3", "flash_attn_interface", (3, 0)),
    4: Package("flash-attn-4", "flash_attn.cute", (4, 0), prereleases=True),
}


@lru_cache(maxsize=len(_PACKAGES))
def missing(version: int) -> str | None:
    """Return why the package of a version of flash-attn is not used, or None."""
    return _PACKAGES[version].missing()
