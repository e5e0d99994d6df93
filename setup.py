"""Builds the native library of `data_pipeline`; everything else about the package is in pyproject.toml.

It is a plain shared library, loaded with ctypes. It needs a C++17 compiler and libjpeg-turbo's `turbojpeg.h`
(Debian, Ubuntu: libturbojpeg0-dev); without them the package installs with the torchvision loader only.
"""

from glob import glob

from setuptools import Extension, setup

setup(
    ext_modules=[
        Extension(
            "data_pipeline._native",
            sources=sorted(glob("data_pipeline/native/*.cpp")),
            depends=sorted(glob("data_pipeline/native/*.h")),
            include_dirs=["data_pipeline/native"],
            libraries=["turbojpeg"],
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-fvisibility=hidden",
                "-Wno-maybe-uninitialized",
            ],
            extra_link_args=["-pthread"],
            optional=True,
        )
    ]
)
