# SPDX-License-Identifier: Apache-2.0
# What is made from crds/: the chart's copies and docs/configuration.md.
.PHONY: chart docs chart-check api-tests

chart: ## copy the CRDs into the chart
	cp crds/*.yaml charts/bpf-dataplane/crds/

docs: venv ## write docs/configuration.md from the CRDs
	$(PY) docs/make_configuration.py

chart-check: venv tools ## helm lint and helm template with every toggle, schemas, drift
	.venv/bin/pytest tests/unit/packaging -q

api-tests: api ## the same as `make api`
