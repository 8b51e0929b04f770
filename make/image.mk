# SPDX-License-Identifier: Apache-2.0
# What BPF programs are compiled against, and the product's image.
KBUILD := build/kbuild

.PHONY: kbuild
kbuild: $(KBUILD)/.ready ## the UAPI header tree BCC compiles against (from linux-libc-dev)

$(KBUILD)/.ready: bpf_templates/kbuild/make_tree.py $(shell find bpf_templates/kbuild/shim -type f)
	/usr/bin/python3 bpf_templates/kbuild/make_tree.py $(KBUILD)
	touch $@
