# SPDX-License-Identifier: Apache-2.0
# What BPF programs are compiled against, and the product's image.
KBUILD := build/kbuild

.PHONY: kbuild
kbuild: $(KBUILD)/.ready ## the UAPI header tree BCC compiles against (from linux-libc-dev)

$(KBUILD)/.ready: bpf_templates/kbuild/make_tree.py $(shell find bpf_templates/kbuild/shim -type f)
	/usr/bin/python3 bpf_templates/kbuild/make_tree.py $(KBUILD)
	touch $@

IMAGE := localhost/bpf-dataplane:dev
IMAGE_ARCHIVE := build/images/bpf-dataplane.tar
WHEELS := build/wheels
# vfs and chroot need nothing of the kernel; the machine's apt settings (proxy, credentials)
# are read, not copied.
BUILDAH := STORAGE_DRIVER=vfs BUILDAH_ISOLATION=chroot buildah
APT_SETTINGS := $(foreach path,/etc/apt/apt.conf /etc/apt/apt.conf.d /etc/apt/auth.conf.d,\
	$(if $(wildcard $(path)),--volume $(path):$(path):ro))
IMAGE_SOURCES = $(shell find operator/bpfdp_operator nodeagent/bpfdp_agent bpf_templates crds -type f -not -name '*.pyc')

.PHONY: image
image: venv base-image $(IMAGE_ARCHIVE) ## build the image and leave it in build/images/ (buildah, no daemon)

$(WHEELS)/.ready: pyproject.toml
	rm -rf $(WHEELS)
	mkdir -p $(WHEELS)
	$(PY) -c 'import tomllib; print("\n".join(tomllib.load(open("pyproject.toml", "rb"))["project"]["dependencies"]))' \
		> build/dependencies.txt
	.venv/bin/pip wheel --quiet --wheel-dir $(WHEELS) --requirement build/dependencies.txt
	touch $@

# build/image is laid out as /usr/share/bpfdp, with our own wheel beside the templates and CRDs.
# The generic programs are compiled here: BCC makes maps while it compiles, a build step may not.
$(IMAGE_ARCHIVE): Containerfile .containerignore $(WHEELS)/.ready $(KBUILD)/.ready $(IMAGE_SOURCES)
	rm -rf build/image build/lib build/bdist.*
	mkdir -p build/image $(@D)
	cp -r bpf_templates build/image/templates
	rm -rf build/image/templates/kbuild
	cp -r crds build/image/crds
	PYTHONPATH=nodeagent BCC_KERNEL_SOURCE=$(CURDIR)/$(KBUILD) BPFDP_TEMPLATES=$(CURDIR)/build/image/templates \
		$(PY) -m bpfdp_agent.bpf.precompile build/image/bytecode
	.venv/bin/pip wheel --quiet --no-deps --wheel-dir build/image .
	$(BUILDAH) bud --layers --pull-never --network host $(APT_SETTINGS) --tag $(IMAGE) --file Containerfile .
	rm -f $@
	$(BUILDAH) push --quiet $(IMAGE) docker-archive:$@:$(IMAGE)
