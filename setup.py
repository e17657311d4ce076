"""Installs `maml`: the library, and the command of the same name.

The distribution is called `maml-keras`: on PyPI, `maml` is another project (materials science).
"""

import pathlib
import re

import setuptools

HERE = pathlib.Path(__file__).parent
VERSION = re.search(r'__version__ = "(.+?)"', (HERE / "maml" / "__init__.py").read_text()).group(1)
CITATION = (HERE / "CITATION.cff").read_text(encoding="utf-8")
REPOSITORY = re.search(r'^repository-code: "?(.+?)/?"?$', CITATION, re.MULTILINE)


def long_description(repository: str | None) -> str:
    """The README for an index, which has none of the files that it links to.

    Relative links become links into the repository or, where it has no address yet, plain text.
    """

    def link(found: re.Match) -> str:
        picture, text, target = found.groups()
        if re.match(r"\w+:|#", target):
            return found[0]
        if repository is None:
            return text
        return f"{picture}[{text}]({repository}/{'raw' if picture else 'blob'}/HEAD/{target})"

    readme = (HERE / "README.md").read_text(encoding="utf-8")
    return re.sub(r"(!?)\[([^][]*)\]\(([^)\s]+)\)", link, readme)


setuptools.setup(
    name="maml-keras",
    version=VERSION,
    description="Few-shot learning in TensorFlow 2 and Keras 3: MAML and twelve more learners",
    long_description=long_description(REPOSITORY and REPOSITORY[1]),
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    keywords=["MAML", "meta-learning", "few-shot learning", "TensorFlow", "Keras", "Omniglot"],
    project_urls={
        "The paper": "https://arxiv.org/abs/1703.03400",
        "The original code": "https://github.com/cbfinn/maml",
        **({"Source": REPOSITORY[1], "Issues": f"{REPOSITORY[1]}/issues"} if REPOSITORY else {}),
    },
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3 :: Only",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
        "Typing :: Typed",
    ],
    packages=[*setuptools.find_packages(include=["maml", "maml.*"]), "maml.mini_imagenet", "maml.flagfiles"],
    package_dir={"maml.mini_imagenet": "data/mini_imagenet", "maml.flagfiles": "flags"},
    package_data={
        "maml": ["py.typed", "weights/*.h5", "weights/*.json"],
        "maml.flagfiles": ["*.flags", "sweeps/*.flags"],
        "maml.mini_imagenet": ["splits/*", "*.bib", "*.md", "*.tsv", "*.txt"],
    },
    install_requires=[
        "absl-py>=2",
        "filelock>=3.20.1",
        "importlib_resources>=6",  # tensorflow-datasets uses it without asking for it
        "keras>=3.12",
        "matplotlib>=3.8",
        "numpy>=1.26",
        "pillow>=10.1",
        "tensorboard>=2.20",
        "tensorflow>=2.21",
        "tensorflow-datasets>=4.9.10",
        "tqdm>=4.66",
    ],
    extras_require={
        "docs": ["mkdocs>=1.6.1", "mkdocs-material>=9.8", "mkdocstrings-python>=2", "ruff==0.17.5"],
        "onnx": ["onnx>=1.17", "onnxruntime>=1.20", "tf2onnx>=1.17"],
        "test": [
            "hypothesis>=6",
            "import-linter>=2",
            "pytest>=8",
            "pytest-benchmark>=5",
            "pytest-xdist>=3.1",
            "ruff==0.17.5",
        ],
    },
    entry_points={"console_scripts": ["maml=maml.commands.runner:main"]},
)
