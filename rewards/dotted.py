"""A user's own function by dotted path: `my.module:fn` is `fn` of the module `my.module`.

The module is imported as `import my.module` would be, with the current folder as the last place
that is searched. Importing runs the module's code: name only modules you trust.
"""

import difflib
import importlib
import os
import sys
from collections.abc import Callable


def load_function(path: str) -> Callable:
    """Import the function that a dotted path names.

    Args:
        path: `package.module:function`.

    Returns:
        The function.

    Raises:
        ValueError: There is no colon, the module cannot be imported, or it has no such function.
            The message starts with the path; the caller knows the config key.
    """
    module_name, colon, name = path.partition(":")
    if not colon or not module_name or not name:
        raise ValueError(
            f"{path!r} is not a dotted path: write module:function, such as my.module:fn."
        )
    module = _import(path, module_name)
    if not hasattr(module, name):
        near = difflib.get_close_matches(name, dir(module), n=1)
        raise ValueError(
            f"{path!r}: module {module_name} has no {name}"
            + (f"; did you mean {near[0]}?" if near else ".")
        )
    function = getattr(module, name)
    if not callable(function):
        raise ValueError(
            f"{path!r} is a {type(function).__name__}, not a function. Name a function after ':'."
        )
    return function


def _import(path: str, module_name: str):
    if os.getcwd() not in sys.path:
        sys.path.append(os.getcwd())
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            raise ValueError(
                f"{path!r}: there is no module {missing}, neither installed nor in the current "
                f"folder {os.getcwd()}. Run from its folder or put that folder on PYTHONPATH."
            ) from error
        raise ValueError(
            f"{path!r}: module {module_name} imports {missing}, which is not installed."
        ) from error
    except Exception as error:
        raise ValueError(
            f"{path!r}: importing {module_name} fails with {type(error).__name__}: {error}"
        ) from error
