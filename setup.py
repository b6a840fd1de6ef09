"Packaging of stasc: every figure and name comes from settings.ini."
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

root = Path(__file__).resolve().parent
cfg = ConfigParser(delimiters=["="])
cfg.read(root / "settings.ini", encoding="utf-8")
cfg = cfg["DEFAULT"]


def lines(key):
    "The non-empty lines of a setting."
    return [o.strip() for o in cfg.get(key, "").splitlines() if o.strip()]


extras = {k.removesuffix("_requirements"): lines(k) for k in cfg if k.endswith("_requirements")}
readme = root / "README.md"

setup(
    name=cfg["lib_name"],
    version=cfg["version"],
    description=cfg["description"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else "",
    long_description_content_type="text/markdown",
    author=cfg["author"],
    url=cfg["git_url"] or None,
    license=cfg["license"],
    keywords=cfg["keywords"].split(),
    python_requires=">=" + cfg["min_python"],
    install_requires=lines("requirements"),
    extras_require=extras,
    packages=find_packages(include=["stasc", "stasc.*"]),
    package_data={"stasc": ["checkpoints/**", "prompts/*.yaml", "data/**"]},
    include_package_data=False,
    entry_points={"console_scripts": lines("console_scripts"), "nbdev": ["stasc=stasc._modidx:d"]},
    zip_safe=False,
)
