# List the targets.
default:
    @just --list

# Run the usual tests in parallel; `just test -m long` runs those that they leave out.
test *args:
    python -m pytest -n auto --dist loadfile {{args}}

# Check style and format.
lint:
    ruff check .
    ruff format --check .

# Check types.
types:
    mypy

# Build the documentation with strict links, and the gallery of reports.
docs:
    zensical build --clean --strict
    python docs/make_gallery.py --site build/site

# Generate the reference and the JSON Schema again.
generate:
    python docs/make_reference.py > docs/reference.md.new && mv docs/reference.md.new docs/reference.md
    python -m distillm_cli schema > recipes/schema.json.new && mv recipes/schema.json.new recipes/schema.json

# Run everything that CI runs, on a fresh copy.
ci:
    .ci/run
