# SPDX-License-Identifier: Apache-2.0
# The virtual environment and the static checks.
.PHONY: venv check lint types layers c-format

venv: .venv/.ready ## make the virtual environment (system packages visible: python3-bpfcc is Debian's)

.venv/.ready: pyproject.toml
	/usr/bin/python3 -m venv --system-site-packages .venv
	.venv/bin/pip install --quiet --editable '.[dev]'
	touch $@

check: lint types layers c-format ## all static checks: ruff, mypy --strict, import-linter, clang-format

lint: venv ## ruff
	.venv/bin/ruff check .
	.venv/bin/ruff format --check .

types: venv ## mypy --strict on operator and agent
	.venv/bin/mypy

layers: venv ## import-linter: pure in the middle, I/O at the edges
	.venv/bin/lint-imports

c-format: ## clang-format on the plain C headers
	clang-format --dry-run --Werror $$(git ls-files 'bpf_templates/*.h' 'bpf_templates/**/*.h')
