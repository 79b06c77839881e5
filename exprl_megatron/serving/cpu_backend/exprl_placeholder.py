"""Names that may be imported, compared and annotated with, but not called."""


class Placeholder:
    """Takes the place of a function or class of an absent package; raises when called."""

    def __init__(self, package: str, name: str):
        self.package = package
        self.__name__ = name

    def __call__(self, *args, **kwargs):
        raise NotImplementedError(f"{self.package}.{self.__name__} does not exist on a machine without CUDA")


def placeholders(package: str):
    """A module-level `__getattr__` that answers every public name of `package` with a placeholder."""

    def __getattr__(name: str) -> Placeholder:
        if name.startswith("__"):
            raise AttributeError(name)
        return Placeholder(package, name)

    return __getattr__
