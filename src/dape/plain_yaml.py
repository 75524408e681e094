"""YAML with the numbers of YAML 1.2 (and `50_000`), exact merges and no repeated keys."""

import re
from typing import Any

import yaml

_INT, _FLOAT, _MERGE = (f"tag:yaml.org,2002:{name}" for name in ("int", "float", "merge"))


def parse(text: str) -> Any:
    """Return the values in YAML text.

    Unlike YAML 1.1, `1:30` and `010` are text rather than 90 and 8. A key given twice is an error,
    but a key may override a key of a merge (`<<: *base`).

    Raises:
        yaml.MarkedYAMLError: with the line, for text that is not YAML. ValueError: for text that is
        not YAML, if the line is not known.
    """
    try:
        return yaml.load(text, _Loader)
    except yaml.MarkedYAMLError:
        raise
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None


class _Loader(yaml.SafeLoader):
    """The loader of `parse`."""

    yaml_implicit_resolvers = {  # noqa: RUF012 (as in the parent)
        first: [(tag, form) for tag, form in resolvers if tag not in (_INT, _FLOAT)]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put the pairs of merges after the pairs of the node: the first pair of a key counts."""
        merges = [value for key, value in node.value if key.tag == _MERGE]
        pairs = [(key, value) for key, value in node.value if key.tag != _MERGE]
        keys = [key.value for key, _ in pairs]
        for key in keys:
            if keys.count(key) > 1:
                raise _mistake(node, f"key {key!r} is given twice")
        for value in merges:
            for base in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(base, yaml.MappingNode):
                    raise _mistake(base, "<< takes a mapping")
                self.flatten_mapping(base)
                own = [key.value for key, _ in pairs]
                pairs += [(key, value) for key, value in base.value if key.value not in own]
        node.value = pairs

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
            kind = node.tag.rpartition(":")[2]
            raise _mistake(node, f"{node.value!r} is no {kind}") from None


def _mistake(node: yaml.Node, problem: str) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=node.start_mark)


_Loader.add_implicit_resolver(
    _INT,
    re.compile(r"[-+]?(?:0|[1-9][0-9_]*|0x[0-9a-fA-F_]+|0b[01_]+)$"),
    list("-+0123456789"),
)
_Loader.add_implicit_resolver(
    _FLOAT,
    re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))$"
    ),
    list("-+0123456789."),
)
