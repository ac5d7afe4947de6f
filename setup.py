"""Installs the module tcpops and the command of the same name."""

import re
from pathlib import Path

from setuptools import setup

HERE = Path(__file__).parent
SOURCE = (HERE / "tcpops.py").read_text(encoding="utf-8")

setup(
    name="tcpops",
    version=re.search(r'^__version__ = "(.+)"$', SOURCE, re.M)[1],
    description="A number for every TCP connection, and its whole life by"
                " that number: Kamailio's TCP Ops module as one file.",
    long_description=(HERE / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="BSD-2-Clause",
    py_modules=["tcpops"],
    python_requires=">=3.9",
    extras_require={"test": ["pytest", "coverage>=7.10"]},
    entry_points={"console_scripts": ["tcpops = tcpops:main"]},
)
