"""Public data sets in their documented original formats, read in blocks as Arrow tables."""

import re
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv

from recsys_moe.errors import UserError
from recsys_moe.sources import column_names, settle_types, stream_csv

_BLOCK = 65_536
_YEAR = re.compile(r"\((\d{4})\)\s*$")

# census-income.names, in its order: 40 attributes, the survey weight and the class.
# fmt: off
_CENSUS = [
    "age", "class_of_worker", "detailed_industry_recode", "detailed_occupation_recode", "education", "wage_per_hour",
    "enroll_in_edu_inst_last_wk", "marital_stat", "major_industry_code", "major_occupation_code", "race",
    "hispanic_origin", "sex", "member_of_a_labor_union", "reason_for_unemployment", "full_or_part_time_employment_stat",
    "capital_gains", "capital_losses", "dividends_from_stocks", "tax_filer_stat", "region_of_previous_residence",
    "state_of_previous_residence", "detailed_household_and_family_stat", "detailed_household_summary_in_household",
    "instance_weight", "migration_code_change_in_msa", "migration_code_change_in_reg", "migration_code_move_within_reg",
    "live_in_this_house_1_year_ago", "migration_prev_res_in_sunbelt", "num_persons_worked_for_employer",
    "family_members_under_18", "country_of_birth_father", "country_of_birth_mother", "country_of_birth_self",
    "citizenship", "own_business_or_self_employed", "fill_inc_questionnaire_for_veterans_admin", "veterans_benefits",
    "weeks_worked_in_year", "year", "income",
]
# fmt: on
_CENSUS_NUMBERS = dict.fromkeys(
    (
        *("age", "wage_per_hour", "capital_gains", "capital_losses", "dividends_from_stocks"),
        *("num_persons_worked_for_employer", "weeks_worked_in_year"),
    ),
    pa.int32(),
) | {"instance_weight": pa.float32()}


def read_census_income(path: Path) -> Iterator[pa.Table]:
    """UCI's census-income.data and .test: no header, fields separated by a comma and a space, the class ends in a full stop.

    Seven attributes are whole numbers (int32), instance_weight is a float32, all others stay text without the blanks around
    it; the industry and occupation codes are names, not numbers, and "?" is a value.
    """
    read = pyarrow.csv.ReadOptions(column_names=_CENSUS)
    parse = pyarrow.csv.ParseOptions(quote_char=False)
    convert = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(_CENSUS, pa.string()), strings_can_be_null=False)
    for batch in pyarrow.csv.open_csv(path, read, parse, convert):
        columns = [pc.utf8_trim_whitespace(column) for column in batch.columns]
        columns = [column.cast(_CENSUS_NUMBERS.get(name, pa.string())) for name, column in zip(_CENSUS, columns, strict=True)]
        yield pa.table(columns, _CENSUS)


def read_csv(path: Path) -> Iterator[pa.Table]:
    """A CSV file with a header; a column has the narrowest type that fits all of its values (KuaiRand documents no more)."""
    for batch in stream_csv(path, settle_types(path, column_names(path))):
        yield pa.Table.from_batches([batch])


def read_ratings(path: Path) -> Iterator[pa.Table]:
    """MovieLens' ratings.dat: UserID::MovieID::Rating::Timestamp, whole stars 1 … 5, seconds since 1970."""
    for rows in _fields(path, 4):
        numbers = [pa.array(map(int, column), pa.int64()) for column in zip(*rows, strict=True)]
        yield pa.table(numbers, ["user_id", "movie_id", "rating", "timestamp"])


def read_users(path: Path) -> Iterator[pa.Table]:
    """MovieLens' users.dat: UserID::Gender::Age::Occupation::Zip-code; age is the lower end of a band."""
    for rows in _fields(path, 5):
        user, gender, age, occupation, zip_code = zip(*rows, strict=True)
        numbers = [pa.array(map(int, column), pa.int64()) for column in (user, age, occupation)]
        texts = [pa.array(gender), pa.array(zip_code)]
        names = ["user_id", "age", "occupation", "gender", "zip_code"]
        yield pa.table([*numbers, *texts], names)


def read_movies(path: Path) -> Iterator[pa.Table]:
    """MovieLens' movies.dat: MovieID::Title::Genres in Latin-1; a title ends in the year of release, genres are split by |."""
    for rows in _fields(path, 3):
        movie, title, genres = zip(*rows, strict=True)
        found = [_YEAR.search(text) for text in title]
        year = pa.array([int(match[1]) if match else None for match in found], pa.int64())
        yield pa.table({"movie_id": pa.array(map(int, movie), pa.int64()), "title": title, "genres": genres, "year": year})


def _fields(path: Path, count: int) -> Iterator[list[list[str]]]:
    """The lines of a .dat file, split at the double colons, in blocks."""
    with path.open(encoding="latin-1", newline="\n") as file:
        number = 0
        while lines := list(islice(file, _BLOCK)):
            rows = [line.rstrip("\r\n").split("::") for line in lines]
            for row in rows:
                number += 1
                if len(row) != count:
                    raise ValueError(f"line {number} has {len(row)} fields, not {count}")
            yield rows


READERS: dict[str, Callable[[Path], Iterator[pa.Table]]] = {
    "census_income": read_census_income,
    "csv": read_csv,
    "movielens_ratings": read_ratings,
    "movielens_users": read_users,
    "movielens_movies": read_movies,
}


def read(path: Path, kind: str, name: str) -> Iterator[pa.Table]:
    """The tables of a file in the format `kind`; `name` is what it is called in the archive.

    Raises:
        UserError: the file is not in the format.
    """
    tables = 0
    try:
        for table in READERS[kind](path):
            tables += 1
            yield table
        if not tables:
            raise ValueError("it is empty")
    except (pa.ArrowInvalid, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise UserError(f"{name!r} is not in its documented format ({reason}); is it the right archive?") from None
