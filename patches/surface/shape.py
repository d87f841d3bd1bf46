"""What SGLang has under a name: its kind, signature, bases, type and the SHA-256 of its source."""

from __future__ import annotations

import ast
import dataclasses
import hashlib
from collections.abc import Iterator

from elora_sglang.patches.surface.code import Class, Code, Function, Member, Module, Value
from elora_sglang.patches.surface.syntax import FunctionNode, Import


@dataclasses.dataclass(frozen=True)
class Shape:
    """One SGLang name as its source states it; empty fields do not apply to its kind.

    Args:
        kind: ``module``, ``class``, ``function``, ``value``, ``method``, ``property`` or ``attribute``.
        defined: where the definition stands: another place than the name for what is re-exported.
        signature: parameters without annotations, as :func:`elora_sglang.patches.base.signature_of` prints them.
        sha256: of the source text, as :func:`elora_sglang.patches.base.fingerprint` makes it.
        bases: of a class, as written.
        abstract: methods of a class that a subclass has to define.
        type: annotation of an attribute, or the value of a module's variable.
    """

    kind: str
    defined: str
    signature: str = ""
    sha256: str = ""
    bases: tuple[str, ...] = ()
    abstract: tuple[str, ...] = ()
    type: str = ""


def describe(code: Code, path: str) -> Shape | None:
    """The shape of what ``path`` names, or None where there is nothing."""
    found = code.find(path)
    if found is None:
        return _from_outside(code, path)
    if isinstance(found, Module):
        return Shape("module", found.name)
    if isinstance(found, Value):
        value = ast.unparse(found.value) if found.value is not None else ""
        return Shape("value", f"{found.module.name}.{found.name}", type=shorten(value))
    if isinstance(found, Class):
        return _of_class(found)
    if isinstance(found, Function):
        return Shape("function", found.path, signature(found.node), sha256(found.module, found.node))
    return _of_member(found)


def _from_outside(code: Code, path: str) -> Shape | None:
    """A name that a module imports from a package that is not read."""
    owner, _, name = path.rpartition(".")
    module = code.find(owner) if owner else None
    bound = module.names.get(name) if isinstance(module, Module) else None
    if not isinstance(bound, Import) or code.module(bound.module) is not None:
        return None
    return Shape("value", path, type=f"from {bound.module}")


def _of_class(cls: Class) -> Shape:
    return Shape(
        "class",
        cls.path,
        constructor(cls),
        sha256(cls.module, cls.node),
        cls.base_names,
        tuple(sorted(cls.abstract)),
    )


def _of_member(member: Member) -> Shape:
    defined = f"{member.owner.path}.{member.name}"
    function = member.function
    if function is None:
        return Shape("attribute", defined, type=_type(member))
    text = "" if member.kind == "property" else signature(function.node)
    returns = function.node.returns if isinstance(function.node, FunctionNode) else None
    type_ = ast.unparse(returns) if member.kind == "property" and returns is not None else ""
    return Shape(_method_kind(member), defined, text, sha256(member.owner.module, function.node), type=type_)


def _method_kind(member: Member) -> str:
    decorators = member.function.decorators if member.function is not None else frozenset()
    special = next((name for name in ("staticmethod", "classmethod") if name in decorators), None)
    return special or member.kind


def _type(member: Member) -> str:
    """The annotation; for a class variable without one, such as an enum's member, its value."""
    if member.annotation is not None:
        node = member.annotation
        return shorten(
            node.value
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
            else ast.unparse(node)
        )
    constant = member.inside is None and member.value is not None
    return "= " + shorten(ast.unparse(member.value)) if constant and member.value is not None else ""


def shorten(text: str) -> str:
    """Long texts by their hash: that they changed is what matters. Of ``A[type, help]`` only the type."""
    if text.startswith("A["):
        parsed = ast.parse(text, mode="eval").body
        inner = parsed.slice if isinstance(parsed, ast.Subscript) else parsed
        return ast.unparse(inner.elts[0] if isinstance(inner, ast.Tuple) else inner)
    if len(text) <= 120:
        return text
    return f"{text[:60]}… sha256 {hashlib.sha256(text.encode()).hexdigest()[:16]}"


def sha256(module: Module, node: ast.AST) -> str:
    """SHA-256 of a definition's lines, decorators included, without blanks at their ends."""
    decorators = getattr(node, "decorator_list", [])
    first = min([node.lineno, *(d.lineno for d in decorators)])  # type: ignore[attr-defined]
    lines = module.lines[first - 1 : node.end_lineno]  # type: ignore[attr-defined]
    return hashlib.sha256("\n".join(line.rstrip() for line in lines).encode()).hexdigest()


def signature(node: FunctionNode | ast.Lambda) -> str:
    """Parameters without annotations and without the values of defaults: ``(self, req, *, limit=...)``."""
    return "(" + ", ".join(_parameters(node.args)) + ")"


def _parameters(arguments: ast.arguments) -> Iterator[str]:
    positional = [*arguments.posonlyargs, *arguments.args]
    required = len(positional) - len(arguments.defaults)
    for number, argument in enumerate(positional):
        yield argument.arg + ("" if number < required else "=...")
        if number + 1 == len(arguments.posonlyargs):
            yield "/"
    if arguments.vararg is not None:
        yield f"*{arguments.vararg.arg}"
    elif arguments.kwonlyargs:
        yield "*"
    for argument, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield argument.arg + ("" if default is None else "=...")
    if arguments.kwarg is not None:
        yield f"**{arguments.kwarg.arg}"


def constructor(cls: Class) -> str:
    """Parameters of a class's constructor, ``self`` included; empty where its source does not show them."""
    member = cls.member("__init__")
    if member is not None and member.function is not None:
        return signature(member.function.node)
    return _of_fields(cls) if cls.is_record else ""


def _of_fields(cls: Class) -> str:
    if cls.assembled:
        return ""  # SGLang puts the fields in an order of its own
    fields: dict[str, str] = {}
    for base in reversed(cls.mro):
        for member in base.own.values():
            if member.annotation is None or member.inside is not None or not _is_field(member):
                continue
            fields[member.name] = member.name + (
                "" if member.value is None or _is_required(member.value) else "=..."
            )
    optional = [text.endswith("=...") for text in fields.values()]
    by_keyword = cls.is_keyword_record or optional != sorted(optional)
    return "(" + ", ".join(["self", *(["*"] if by_keyword and fields else []), *fields.values()]) + ")"


def _is_field(member: Member) -> bool:
    text = ast.unparse(member.annotation) if member.annotation is not None else ""
    value = ast.unparse(member.value) if member.value is not None else ""
    return (
        not text.startswith(("ClassVar", "typing.ClassVar"))
        and "init=False" not in value
        and member.name != "model_config"
    )


def _is_required(value: ast.expr) -> bool:
    """Whether ``field(...)`` gives no default."""
    if not isinstance(value, ast.Call) or not ast.unparse(value.func).endswith(("field", "Field")):
        return False
    names = {keyword.arg for keyword in value.keywords}
    first = value.args[0] if value.args else None
    no_default = first is None or (isinstance(first, ast.Constant) and first.value is Ellipsis)
    return not names & {"default", "default_factory"} and no_default
