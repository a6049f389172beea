"""The versions of the packages that results depend on."""

from importlib.metadata import PackageNotFoundError, version

PACKAGES = ("kronos-qlib", "pyqlib", "torch", "numpy", "pandas", "mlflow", "safetensors", "huggingface_hub")


def package_version(package: str) -> str | None:
    """Return a package's version; None where it is not installed, as of a checkout that is imported."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def package_versions() -> dict[str, str | None]:
    """Return the versions of the packages that results depend on."""
    return {name: package_version(name) for name in PACKAGES}
