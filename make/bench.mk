# SPDX-License-Identifier: Apache-2.0
# Benchmarks. Every published number comes from one of these; results go to build/results/.
.PHONY: bench-packet

bench-packet: venv kbuild ## what a packet costs by PROG_TEST_RUN, over a bare LRU lookup and counter (root)
	$(PY) tests/bench/packet.py

.PHONY: bench-services
bench-services: packages venv kbuild tools image node-images ## ours beside kube-proxy iptables and nftables, in one run (root; about 40 minutes; ARGS=--help)
	PYTHONPATH=tests:tests/bench:nodeagent $(PY) -m versus $(ARGS)

.PHONY: bench-agent
bench-agent: venv kbuild tools ## the agent at 10,000 services without a cluster: start, memory, latency, CPU (root; about 3 minutes)
	$(PY) tests/bench/agent_scale.py $(ARGS)
