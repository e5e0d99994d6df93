"""Builds the native libraries of `data_pipeline` and `mokd`; everything else about the package is in pyproject.toml.

They are plain shared libraries, loaded with ctypes, and need a C++17 compiler; that of `data_pipeline` also needs
libjpeg-turbo's `turbojpeg.h` (Debian, Ubuntu: libturbojpeg0-dev). Without the one the package installs with the
torchvision loader only; without the other the loss on CPUs is slower.
"""

from glob import glob

from setuptools import Extension, find_packages, setup

FLAGS = [
    "-std=c++17",
    "-O3",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-Wno-maybe-uninitialized",
]

setup(
    # the configurations lie beside the packages, and inside of one where they are installed
    packages=[*find_packages(include=["launcher*", "mokd*", "data_pipeline*"]), "launcher.configs"],
    package_dir={"launcher.configs": "configs"},
    package_data={"launcher.configs": ["*.yaml"]},
    include_package_data=False,  # the native sources are for building
    ext_modules=[
        Extension(
            "data_pipeline._native",
            sources=sorted(glob("data_pipeline/native/*.cpp")),
            depends=sorted(glob("data_pipeline/native/*.h")),
            include_dirs=["data_pipeline/native"],
            libraries=["turbojpeg"],
            extra_compile_args=FLAGS,
            extra_link_args=["-pthread"],
            optional=True,
        ),
        # OpenMP's functions are left open: torch brings them
        Extension(
            "mokd._native",
            sources=sorted(glob("mokd/native/*.cpp")),
            extra_compile_args=[*FLAGS, "-fopenmp"],
            optional=True,
        ),
    ],
)
