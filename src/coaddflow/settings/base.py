"""Base class of all sections of the settings."""

import ast
import datetime
import inspect
import itertools
import textwrap
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, GetJsonSchemaHandler


def _as_id(value: object) -> object:
    """Return the text of an id that YAML took for a number or a date."""
    is_id = isinstance(value, int | datetime.date) and not isinstance(value, bool)
    return str(value) if is_id else value


Id = Annotated[str, BeforeValidator(_as_id)]
"""An id that YAML may have taken for a number or a date."""

Ids = tuple[Id, ...]
"""Ids of exposures or bands; ``[1001]`` is the id "1001"."""


class Section(BaseModel):
    """A group of settings: immutable, and an unknown key is an error, never ignored.

    Attributes
    ----------
    without_effect : frozenset of str
        Settings of the section that products do not depend on (memory, scratch folders).
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    without_effect: ClassVar[frozenset[str]] = frozenset()

    def changed(self) -> dict[str, Any]:
        """Return what products depend on here and differs from its default, as plain values.

        A key that is added with a neutral default changes nothing here. Of a part that is
        switched off (``enabled: false``) nothing else counts.
        """
        return self._changed_from(None)

    def _changed_from(self, default: "Section | None") -> dict[str, Any]:
        """Return the same with the defaults that the section above has for this one."""
        fields = type(self).model_fields
        if default is None:
            defaults = {
                name: field.get_default(call_default_factory=True) for name, field in fields.items()
            }
        else:
            defaults = {name: getattr(default, name) for name in fields}
        if getattr(self, "enabled", True) is False:
            fields = {"enabled": fields["enabled"]}
        found: dict[str, Any] = {}
        for name in fields.keys() - self.without_effect:
            value, usual = getattr(self, name), defaults[name]
            if value == usual:
                continue
            if isinstance(value, Section):
                nested = value._changed_from(usual if isinstance(usual, Section) else None)
                found |= {name: nested} if nested else {}
            else:
                plain = self.model_dump(mode="json", include={name}, exclude_defaults=True)
                # a default of the section above that this class does not have
                found |= plain or self.model_dump(mode="json", include={name})
        return dict(sorted(found.items()))

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: GetJsonSchemaHandler) -> Any:
        schema = handler(core)
        properties = handler.resolve_ref_schema(schema)["properties"]
        for name, text in descriptions(cls).items():
            properties[name] = properties[name] | ({"description": text} if text else {})
        return schema


def descriptions(model: type[BaseModel]) -> dict[str, str]:
    """Return what is said of each field of a model: in the text below it, or in its `Field`.

    The texts are taken from the source when they are asked for: a run has no use for them.
    """
    found = {name: field.description or "" for name, field in model.model_fields.items()}
    for section in reversed(model.__mro__):
        if issubclass(section, Section):
            tree = ast.parse(textwrap.dedent(inspect.getsource(section)))
            for statement, below in itertools.pairwise(tree.body[0].body):
                match statement, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ) if name in found:
                        found[name] = " ".join(text.split())
    return found
