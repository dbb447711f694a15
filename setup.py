"""Package metadata lives in settings.ini; this file only hands it to setuptools."""
import shlex
from configparser import ConfigParser
from pathlib import Path

from setuptools import find_packages, setup

here = Path(__file__).parent
config = ConfigParser(delimiters=["="])
config.read(here / "settings.ini", encoding="utf-8")
settings = config["DEFAULT"]
package = settings["lib_path"]

setup(
    name=settings["lib_name"],
    version=settings["version"],
    description=settings["description"],
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    author=settings["author"],
    author_email=settings["author_email"],
    license="Apache-2.0",
    keywords=settings["keywords"].split(),
    packages=find_packages(include=[package, f"{package}.*"]),
    package_data={package: ["live/page/*"]},
    python_requires=">=3.11,<3.12",
    install_requires=shlex.split(settings["requirements"]),
    extras_require={
        "dev": shlex.split(settings["dev_requirements"]),
        "bench": shlex.split(settings["bench_requirements"]),
    },
    entry_points={
        "console_scripts": ["delta-go = delta_go.cli:main", "delta-go-serve = delta_go.serving.server:main"],
        "nbdev": [f"{package} = {package}._modidx:d"],
    },
)
