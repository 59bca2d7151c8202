"""The one reader of settings.ini: version, ranges and commands stand there and nowhere else."""
import shutil
from configparser import ConfigParser
from pathlib import Path
from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

root = Path(__file__).parent
parser = ConfigParser(delimiters=["="]); parser.read(root/"settings.ini", encoding="utf-8")
cfg = parser["DEFAULT"]

class WithNotebooks(build_py):
    "Carries the recipe notebooks and the claims into the wheel; an editable install reads them from the checkout."
    def run(self):
        super().run()
        if getattr(self, "editable_mode", False): return
        data = Path(self.build_lib)/cfg["lib_name"]
        shutil.rmtree(data/"notebooks", ignore_errors=True)  # a build folder may hold those of an earlier version
        (data/"notebooks").mkdir(parents=True)
        for notebook in sorted((root/cfg["nbs_path"]/"recipes").glob("*.ipynb")): shutil.copy(notebook, data/"notebooks")
        if (root/"claims.toml").exists(): shutil.copy(root/"claims.toml", data)

low, high = cfg["min_python"], cfg["max_python"]
minors = range(int(low.split(".")[1]), int(high.split(".")[1]) + 1)
readme = root/"README.md"
setup(
    version=cfg["version"], description=cfg["description"], keywords=cfg["keywords"], license="Apache-2.0",
    author=cfg["author"], author_email=cfg["author_email"], url=cfg["git_url"],
    long_description=readme.read_text(encoding="utf-8") if readme.exists() else cfg["description"],
    long_description_content_type="text/markdown",
    classifiers=["Development Status :: 3 - Alpha", "Intended Audience :: Science/Research",
                 "Topic :: Scientific/Engineering :: Artificial Intelligence",
                 *(f"Programming Language :: Python :: 3.{m}" for m in minors)],
    packages=find_packages(include=[cfg["lib_name"], cfg["lib_name"] + ".*"]),
    install_requires=cfg["requirements"].split(),
    extras_require={k.removesuffix("_requirements"): v.split() for k, v in cfg.items() if k.endswith("_requirements")},
    entry_points={"console_scripts": cfg["console_scripts"].split()},
    cmdclass={"build_py": WithNotebooks}, zip_safe=False)
