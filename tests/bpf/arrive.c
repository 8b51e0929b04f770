// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// For tests: gives a packet the tunnel metadata that the VXLAN device would have, and goes on to
// the program in slot 0. The outer source is in the mark (IPv4), or fd00::<mark>.
#include <uapi/linux/pkt_cls.h>

BPF_TABLE("prog", u32, u32, onward, 1);

static int arrive(struct __sk_buff *skb, __u64 flags)
{
    struct bpf_tunnel_key key = {.tunnel_id = 4096, .tunnel_ttl = 64};
    if (flags) {
        key.local_ipv6[0] = bpf_htonl(0xfd000000);
        key.local_ipv6[3] = bpf_htonl(skb->mark);
    } else {
        key.local_ipv4 = skb->mark;
    }
    if (bpf_skb_set_tunnel_key(skb, &key, sizeof(key), flags) < 0)
        return TC_ACT_SHOT;
    skb->mark = 0;
    onward.call(skb, 0);
    return TC_ACT_SHOT;
}

int arrive4(struct __sk_buff *skb)
{
    return arrive(skb, 0);
}

int arrive6(struct __sk_buff *skb)
{
    return arrive(skb, BPF_F_TUNINFO_IPV6);
}
