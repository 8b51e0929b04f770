# SPDX-License-Identifier: Apache-2.0
"""kube-proxy's part of an iptables-save text."""

from __future__ import annotations

from bpfdp_agent.dataplane.iptables_save import parse, removal

NAT = """\
*nat
:PREROUTING ACCEPT [0:0]
:CNI-HOSTPORT - [0:0]
:KUBE-SERVICES - [0:0]
:KUBE-SVC-ABC - [0:0]
-A PREROUTING -m comment --comment "portals -j KUBE-NOT" -j KUBE-SERVICES
-A PREROUTING -j CNI-HOSTPORT
-A KUBE-SERVICES -d 10.0.0.1/32 -p tcp -m tcp --dport 80 -j KUBE-SVC-ABC
COMMIT
"""
FIREWALL = "*filter\n:KUBE-FIREWALL - [0:0]\n-A INPUT -j KUBE-FIREWALL\nCOMMIT\n"
KUBELETS = "*mangle\n:KUBE-KUBELET-CANARY - [0:0]\n:KUBE-IPTABLES-HINT - [0:0]\nCOMMIT\n"


def test_removal_is_one_transaction_that_leaves_other_rules():
    assert removal(parse(NAT)) == (
        "*nat\n"
        ":KUBE-SERVICES - [0:0]\n"
        ":KUBE-SVC-ABC - [0:0]\n"
        '-D PREROUTING -m comment --comment "portals -j KUBE-NOT" -j KUBE-SERVICES\n'
        "-X KUBE-SERVICES\n"
        "-X KUBE-SVC-ABC\n"
        "COMMIT\n"
    )


def test_the_kubelets_chains_are_left():
    assert parse(KUBELETS) == []
    assert removal(parse(KUBELETS)) == ""


def test_the_shared_chain_belongs_to_the_kubelet_where_there_is_one():
    assert [table.name for table in parse(FIREWALL)] == ["filter"]
    assert parse(KUBELETS + FIREWALL) == []


def test_nothing_of_kube_proxy():
    assert parse("*nat\n:PREROUTING ACCEPT [0:0]\n-A PREROUTING -j CNI-X\nCOMMIT\n") == []
    assert parse("") == []
