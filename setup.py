"""What setup.cfg cannot say: the configs go into the package, and the README's links work wherever it is shown."""

import re
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent


def portable(text: str, home: str) -> str:
    """Markdown whose links to files of the repository are addresses under `home`, or plain words where it has none."""
    local = r"\[([^][]*)\]\((?!https?://|#)([^)\s]+)\)"
    if home:
        text = re.sub("!" + local, rf"![\1]({home}/raw/HEAD/\2)", text)
        return re.sub(local, rf"[\1]({home}/blob/HEAD/\2)", text)
    return re.sub(local, r"\1", re.sub(rf"^!{local}\n\n?", "", text, flags=re.MULTILINE))


def description() -> str:
    """The README as package registries show it."""
    settings = ConfigParser()
    settings.read(ROOT / "setup.cfg")
    return portable((ROOT / "README.md").read_text(encoding="utf-8"), settings["metadata"].get("url", ""))


if __name__ == "__main__":
    setup(
        packages=[*find_packages(include=["score_sde", "score_sde.*"]), "score_sde.configs"],
        package_dir={"score_sde.configs": "configs"},  # one source: a checkout, editable installs too, reads it there
        long_description=description(),
        long_description_content_type="text/markdown",
    )
