// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// What a policy program may rely on.
//
// A policy program judges one direction of one pod (or of every pod with the same text). It is
// tail-called with the flow in per-CPU scratch, after the service's address was replaced by the
// backend's, and ends with policy_allow() or policy_deny():
//
//     int policy(struct __sk_buff *skb)
//     {
//         struct flow *flow = policy_flow();
//         if (!flow)
//             return policy_deny(skb);
//         addr_t *peer = policy_peer(flow, POLICY_INGRESS);
//         ...
//         return policy_allow(skb, flow);
//     }
//
// flow->proto is the IP protocol, policy_dport(flow) the destination port (network order; 0 where
// the protocol has none, and for ICMP).

static __always_inline struct flow *policy_flow(void) {
    __u32 zero = 0;
    return scratch.lookup(&zero);
}

// The other end: who the flow comes from (POLICY_INGRESS) or where it goes (POLICY_EGRESS).
static __always_inline addr_t *policy_peer(struct flow *flow, __u32 direction) {
    return direction == POLICY_EGRESS ? &flow->new_dst : &flow->src;
}

static __always_inline __be16 policy_dport(struct flow *flow) {
    return flow->new_dport;
}

static __always_inline int policy_deny(struct __sk_buff *skb) {
    count(COUNT_DROP_POLICY);
    return TC_ACT_SHOT;
}

// On to the other pod's policy, if there is one, and then to the end of the chain.
static __always_inline int policy_allow(struct __sk_buff *skb, struct flow *flow) {
    __u32 slot = flow->next_slot;
    if (slot) {
        flow->next_slot = 0;
        flow->direction = POLICY_INGRESS;
        policy.call(skb, slot);
        count(COUNT_DROP_POLICY_MISSING);
        return TC_ACT_SHOT;
    }
    jumps.call(skb, JUMP_FINISH);
    count(COUNT_DROP_INTERNAL);
    return TC_ACT_SHOT;
}
