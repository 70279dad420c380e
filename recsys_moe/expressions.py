"""Label, mask and weight expressions of a schema, evaluated on Arrow tables.

A small part of Python's expression syntax, parsed and never executed: column names, numbers, strings, True/False,
`== != < <= > >=`, `in [..]`, `not in [..]`, `and or not`, `+ - * /`. Nulls follow Kleene's logic: a comparison with a
null is null, which the caller reads as "not observed".
"""

import ast
from collections.abc import Callable
from functools import reduce
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from recsys_moe.columns import kind_of
from recsys_moe.errors import UserError, nearest

_COMPARE: dict[type[ast.cmpop], Callable[..., Any]] = {
    ast.Eq: pc.equal,
    ast.NotEq: pc.not_equal,
    ast.Lt: pc.less,
    ast.LtE: pc.less_equal,
    ast.Gt: pc.greater,
    ast.GtE: pc.greater_equal,
}
_ARITHMETIC: dict[type[ast.operator], Callable[..., Any]] = {
    ast.Add: pc.add,
    ast.Sub: pc.subtract,
    ast.Mult: pc.multiply,
    ast.Div: pc.divide,
}


class Expression:
    """A parsed expression; `columns` are the names it reads.

    >>> e = Expression('marital == "Never married" or age < 3')
    >>> e(pa.table({"marital": ["Never married", "Widowed", None], "age": [30, 40, 50]})).to_pylist()
    [True, False, None]

    Raises:
        UserError: syntax outside of the part described above.
    """

    def __init__(self, text: str) -> None:
        self.text = text
        try:
            self._tree = ast.parse(text.strip(), mode="eval").body
        except SyntaxError as error:
            raise UserError(f"expression {text!r} can't be read ({error.msg}); compare columns with values") from None
        self.columns = tuple(sorted({n.id for n in ast.walk(self._tree) if isinstance(n, ast.Name)}))
        self._check(self._tree)

    def _check(self, node: ast.AST) -> None:
        allowed = (
            *(ast.BoolOp, ast.And, ast.Or, ast.UnaryOp, ast.Not, ast.USub, ast.BinOp, ast.Compare, ast.In, ast.NotIn),
            *(ast.Name, ast.Load, ast.Constant, ast.List, ast.Tuple),
            *_COMPARE,
            *_ARITHMETIC,
        )
        for part in ast.walk(node):
            if not isinstance(part, allowed):
                raise UserError(
                    f"expression {self.text!r} uses {type(part).__name__}, which is not part of the language; "
                    "use columns, constants, comparisons, in, and/or/not, + - * /"
                )

    def __call__(self, table: pa.Table) -> pa.ChunkedArray:
        """The value for each row of `table`.

        Raises:
            UserError: a column that the table lacks, or types that can't be compared.
        """
        for column in self.columns:
            if column not in table.column_names:
                raise UserError(
                    f"expression {self.text!r} needs column {column!r}, which the data lacks; "
                    f"{nearest(column, table.column_names)}"
                )
        try:
            value = self._evaluate(self._tree, table)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, OverflowError) as error:
            kinds = ", ".join(f"{c} is {kind_of(table[c])}" for c in self.columns)
            reason = str(error).split("\n")[0]
            raise UserError(
                f"expression {self.text!r} can't be evaluated, since {kinds} ({reason}); mend the column, or compare it with "
                "values of its type"
            ) from None
        if isinstance(value, pa.Scalar):
            value = pa.chunked_array([pa.repeat(value, table.num_rows)])
        return value

    def _evaluate(self, node: ast.AST, table: pa.Table) -> Any:
        def value(n: ast.AST) -> Any:
            return self._evaluate(n, table)

        match node:
            case ast.Name(id=name):
                return table[name]
            case ast.Constant(value=constant):
                return pa.scalar(constant)
            case ast.BoolOp(op=op, values=values):
                combine = pc.and_kleene if isinstance(op, ast.And) else pc.or_kleene
                return reduce(combine, (value(v) for v in values))
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                return pc.invert(value(operand))
            case ast.UnaryOp(operand=operand):
                return pc.negate(value(operand))
            case ast.BinOp(left=left, op=op, right=right):
                a, b = value(left), value(right)
                if isinstance(op, ast.Div):  # never whole-number division
                    a, b = pc.cast(a, pa.float64()), pc.cast(b, pa.float64())
                return _ARITHMETIC[type(op)](a, b)
            case ast.Compare(left=left, ops=ops, comparators=comparators):
                sides = [left, *comparators]
                pairs = [self._compare(a, op, b, table) for a, op, b in zip(sides, ops, sides[1:], strict=False)]
                return reduce(pc.and_kleene, pairs)
        raise UserError(f"expression {self.text!r}: a list can stand only behind 'in'; compare a column with a value")

    def _compare(self, left: ast.AST, op: ast.cmpop, right: ast.AST, table: pa.Table) -> Any:
        a = self._evaluate(left, table)
        if not isinstance(op, (ast.In, ast.NotIn)):
            return _COMPARE[type(op)](a, self._evaluate(right, table))
        if not (isinstance(right, (ast.List, ast.Tuple)) and all(isinstance(e, ast.Constant) for e in right.elts)):
            raise UserError(f"expression {self.text!r}: write a list of constants behind 'in', such as ['a', 'b']")
        wanted = [e.value for e in right.elts if isinstance(e, ast.Constant) and e.value is not None]
        found = reduce(pc.or_, (pc.equal(a, pa.scalar(v)) for v in wanted), pa.scalar(False))
        found = pc.if_else(pc.is_valid(a), found, pa.scalar(None, pa.bool_()))
        return pc.invert(found) if isinstance(op, ast.NotIn) else found
