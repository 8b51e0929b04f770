// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// A flow's first packet: may it come from here, which backend, which way, and who judges it.

#define FLOW_HAIRPIN 1

static __always_inline int drop(__u32 reason) {
    count(reason);
    return TC_ACT_SHOT;
}

static __always_inline int to_stack(void) {
    count(COUNT_STACK);
    return TC_ACT_UNSPEC;
}

// Runs the flow's policies, the source pod's first, and then `finish`.
static __always_inline int judge(struct __sk_buff *skb, struct flow *flow, __u32 egress_slot,
                                 __u32 ingress_slot) {
    struct settings *node = node_settings();
    if (!node || node->flags & SETTINGS_POLICY_DISABLED)
        egress_slot = ingress_slot = POLICY_SLOT_ALLOW;
    flow->next_slot = ingress_slot;
    if (!egress_slot)
        return policy_allow(skb, flow);
    flow->direction = POLICY_EGRESS;
    policy.call(skb, egress_slot);
    return drop(COUNT_DROP_POLICY_MISSING);
}

// The service that the flow's destination belongs to. A marker is found for an undefined port of a
// ClusterIP; it has no backends.
static __always_inline struct frontend *find_frontend(struct flow *flow) {
    struct frontend *frontend = frontend_of(&flow->dst, flow->dport, flow->proto);
    if (frontend)
        return frontend;
    __u32 *own = own_addresses.lookup((struct address_key *)&flow->dst);
    if (own)
        return *own & 1 ? frontend_of_node(flow->dport, flow->proto) : NULL;
    if (flow->hook == HOOK_FROM_TUNNEL) // any address of the first node: it has more than we know
        frontend = frontend_of_node(flow->dport, flow->proto);
    else if (flow->hook == HOOK_FROM_POD)
        frontend = shared_node_port(&flow->dst, flow->dport, flow->proto);
    if (frontend)
        return frontend;
    return frontend_of(&flow->dst, 0, 0);
}

enum { CHOSEN, CHOICE_REJECT, CHOICE_DROP };

// Puts the chosen backend's address into the flow. A drop is counted.
static __always_inline int choose(struct flow *flow, struct frontend *frontend,
                                  struct backend **backend) {
    int internal = flow->hook == HOOK_FROM_POD;
    __u32 local = internal ? FRONTEND_INTERNAL_LOCAL : FRONTEND_EXTERNAL_LOCAL;
    __u32 silent = internal ? FRONTEND_INTERNAL_DROP : FRONTEND_EXTERNAL_DROP;
    __u32 kind = frontend->flags & local ? LIST_LOCAL : LIST_CLUSTER;
    __u32 id = 0;
    if (flow->hook == HOOK_FROM_TUNNEL) { // the first node chose this one
        kind = LIST_LOCAL;
        silent = ~0;
    } else if (!client_allowed(frontend, &flow->src)) {
        count(COUNT_DROP_SOURCE_RANGE);
        return CHOICE_DROP;
    }
    __u32 hash = choice_hash(frontend, &flow->src, &flow->dst, flow->sport << 16 | flow->dport);
    struct backend *chosen = choose_backend(frontend, kind, &flow->src, hash, &id);
    if (!chosen) {
        if (!(silent == ~0 || frontend->flags & silent))
            return CHOICE_REJECT;
        count(COUNT_DROP_NO_BACKEND);
        return CHOICE_DROP;
    }
    flow->new_dst = chosen->addr;
    flow->new_dport = chosen->port;
    flow->backend = id;
    *backend = chosen;
    return CHOSEN;
}

static __always_inline void hairpin(struct flow *flow, const struct settings *node) {
    node_address(node, &flow->new_src);
    flow->flags |= FLOW_HAIRPIN;
}

// From a pod of this node: to a pod of this node or another one past the stack, else through it.
static __always_inline int route_from_pod(struct __sk_buff *skb, struct flow *flow,
                                          const struct endpoint *source,
                                          const struct endpoint *target) {
    __u32 ingress_slot = 0;
    flow->in_ifindex = source->ifindex;
    flow->action = ACT_STACK;
    flow->reply_action = ACT_STACK;
    if (target) {
        flow->action = ACT_PEER;
        flow->ifindex = target->ifindex;
        flow->reply_in_ifindex = target->ifindex;
        ingress_slot = target->ingress_slot;
    } else {
        struct identity *who = identity_of(&flow->new_dst);
        if (who && who->flags & IDENTITY_POD)
            flow->action = ACT_NEIGH;
        else if (!who && !own_address(&flow->new_dst) && in_service_range(&flow->new_dst))
            return drop(COUNT_DROP_NO_SERVICE);
    }
    if (flow->action != ACT_STACK) {
        flow->reply_action = ACT_PEER;
        flow->reply_ifindex = source->ifindex;
    }
    return judge(skb, flow, source->egress_slot, ingress_slot);
}

// A pod's packet to a node's tunnel port: masqueraded by the CNI it would be believed there.
static __always_inline int to_tunnel_port(const struct flow *flow, const struct settings *node) {
    struct node_key peer;
    if (flow->proto != IPPROTO_UDP || !node->tunnel_ifindex || flow->dport != node->tunnel_port)
        return 0;
    addr_to_node(&flow->dst, &peer);
    return nodes.lookup(&peer) != NULL;
}

static __always_inline int flow_from_pod(struct __sk_buff *skb, struct flow *flow) {
    struct settings *node = node_settings();
    struct backend *backend = NULL;
    struct endpoint *source = endpoint_of(&flow->src);
    if (!node || !source || source->ifindex != skb->ifindex)
        return drop(COUNT_DROP_SPOOFED);
    if (to_tunnel_port(flow, node))
        return drop(COUNT_DROP_SPOOFED);

    struct endpoint *target = endpoint_of(&flow->dst);
    if (target)
        return route_from_pod(skb, flow, source, target);
    struct frontend *frontend = find_frontend(flow);
    if (!frontend)
        return route_from_pod(skb, flow, source, NULL);
    if (flow->proto == IPPROTO_TCP && !is_opening(flow->tcp_flags)) {
        if (source->egress_slot && !(node->flags & SETTINGS_POLICY_DISABLED))
            return drop(COUNT_DROP_POLICY); // where it would go is not known, so not allowed
        return to_stack();                  // translated by netfilter, if by anyone
    }
    int choice = choose(flow, frontend, &backend);
    if (choice == CHOICE_DROP)
        return TC_ACT_SHOT;
    if (choice == CHOICE_REJECT) {
        jumps.call(skb, JUMP_REJECT);
        return drop(COUNT_DROP_INTERNAL);
    }
    if (addr_equal(&flow->new_dst, &flow->src))
        hairpin(flow, node);
    return route_from_pod(skb, flow, source, endpoint_of(&flow->new_dst));
}

// Into a pod of this node, from outside or through the tunnel.
static __always_inline int route_into_pod(struct __sk_buff *skb, struct flow *flow,
                                          const struct endpoint *target) {
    flow->action = ACT_PEER;
    flow->ifindex = target->ifindex;
    flow->reply_in_ifindex = target->ifindex;
    return judge(skb, flow, POLICY_SLOT_ALLOW, target->ingress_slot);
}

// Between nodes, in our VXLAN or the CNI's: its device takes it, no service or policy is for it.
static __always_inline int is_tunnelled(const struct flow *flow, const struct settings *node) {
    if (flow->proto != IPPROTO_UDP || !flow->dport || !own_address(&flow->dst))
        return 0;
    return flow->dport == node->overlay_port ||
           (node->tunnel_ifindex && flow->dport == node->tunnel_port);
}

static __always_inline int flow_from_net(struct __sk_buff *skb, struct flow *flow) {
    struct settings *node = node_settings();
    struct backend *backend = NULL;
    if (!node || endpoint_of(&flow->src))
        return drop(COUNT_DROP_SPOOFED);
    if (is_tunnelled(flow, node))
        return to_stack();

    flow->reply_action = ACT_NEIGH;
    struct endpoint *target = endpoint_of(&flow->dst);
    if (target)
        return route_into_pod(skb, flow, target);
    struct frontend *frontend = find_frontend(flow);
    if (!frontend) {
        if (in_service_range(&flow->dst) && !own_address(&flow->dst))
            return drop(COUNT_DROP_NO_SERVICE);
        return to_stack();
    }
    int choice = choose(flow, frontend, &backend);
    if (choice == CHOICE_DROP)
        return TC_ACT_SHOT;
    if (choice == CHOICE_REJECT || !backend) {
        jumps.call(skb, JUMP_REJECT);
        return drop(COUNT_DROP_INTERNAL);
    }
    target = endpoint_of(&flow->new_dst);
    if (target)
        return route_into_pod(skb, flow, target);
    if (own_address(&flow->new_dst)) { // a process of this node
        flow->action = ACT_STACK;
        flow->reply_action = ACT_STACK;
        flow->reply_flags = CT_HOST_REPLY;
        return judge(skb, flow, POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW);
    }
    // On another node: as it is, through the tunnel. That node chooses among its own backends.
    if (!node->tunnel_ifindex || !((__be32 *)backend->node)[3])
        return drop(COUNT_DROP_NO_BACKEND);
    flow->new_dst = flow->dst;
    flow->new_dport = flow->dport;
    flow->action = ACT_TUNNEL;
    flow->ifindex = node->tunnel_ifindex;
    flow->reply_in_ifindex = node->tunnel_ifindex;
    copy_node(flow->node, backend->node);
    return judge(skb, flow, POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW);
}

static __always_inline int direct_return(const struct flow *flow, const struct settings *node) {
    if (!(node->flags & SETTINGS_DSR))
        return 0;
    struct cidr_key client = {.prefixlen = ADDR_BITS, .addr = flow->src};
    return dsr_optout.lookup(&client) == NULL;
}

// Where the client's packets would arrive without the tunnel: a strict reverse path filter accepts
// them on no other interface.
static __always_inline __u32 input_interface(struct __sk_buff *skb, const addr_t *client,
                                             const struct settings *node) {
    struct bpf_fib_lookup fib = {.family = FAMILY_AF, .ifindex = node->data_ifindex};
#if FAMILY == 4
    fib.ipv4_dst = client->w[0];
#else
    __builtin_memcpy(fib.ipv6_dst, client, 16);
#endif
    if (fib_lookup(skb, &fib) < 0 || !is_data_interface(fib.ifindex))
        return node->data_ifindex;
    return fib.ifindex;
}

static __always_inline int flow_from_tunnel(struct __sk_buff *skb, struct flow *flow) {
    struct settings *node = node_settings();
    struct backend *backend = NULL;
    struct node_key first = {};
    if (!node || tunnel_source(skb, &first) < 0)
        return drop(COUNT_DROP_TUNNEL_SOURCE);
    struct frontend *frontend = find_frontend(flow);
    if (!frontend || (flow->proto == IPPROTO_TCP && !is_opening(flow->tcp_flags)))
        return drop(COUNT_DROP_TUNNEL_UNKNOWN);
    if (choose(flow, frontend, &backend) != CHOSEN)
        return TC_ACT_SHOT;

    int direct = direct_return(flow, node);
    flow->in_ifindex = node->tunnel_ifindex;
    copy_node(flow->node, first.addr);
    flow->reply_action = direct ? ACT_NEIGH : ACT_TUNNEL;
    flow->reply_ifindex = direct ? 0 : node->tunnel_ifindex;
    struct endpoint *target = endpoint_of(&flow->new_dst);
    if (target)
        return route_into_pod(skb, flow, target);
    if (!own_address(&flow->new_dst))
        return drop(COUNT_DROP_TUNNEL_UNKNOWN);
    flow->action = ACT_HOST_IN;
    flow->ifindex = input_interface(skb, &flow->src, node);
    flow->reply_flags = CT_HOST_REPLY;
    if (direct)
        flow->reply_action = ACT_STACK;
    return judge(skb, flow, POLICY_SLOT_ALLOW, POLICY_SLOT_ALLOW);
}

// To a pod from another address (the pods' gateway) than the pod's packet was sent to.
static __always_inline void answer_as_asked(struct flow *flow) {
    struct ct_key key;
    __builtin_memcpy(&key, flow, sizeof(key));
    if (!answer_at_main_address(&key))
        return;
    struct ct *asked = ct.lookup(&key);
    if (!asked || !(asked->flags & CT_REPLY))
        return;
    flow->new_src = asked->new_src;
    flow->new_sport = asked->new_sport;
}

// Through the stack to a pod: from the node itself always (whichever of its addresses it uses, the
// pods' gateway for one), from elsewhere if its policy allows.
static __always_inline int flow_to_pod(struct __sk_buff *skb, struct flow *flow) {
    struct endpoint *target = endpoint_of(&flow->dst);
    __u32 ingress_slot = target ? target->ingress_slot : POLICY_SLOT_ALLOW;
    flow->action = ACT_STACK;
    flow->reply_action = ACT_STACK;
    if (target)
        flow->reply_in_ifindex = target->ifindex;
    if (!skb->ingress_ifindex) {
        ingress_slot = POLICY_SLOT_ALLOW;
        answer_as_asked(flow);
    }
    return judge(skb, flow, POLICY_SLOT_ALLOW, ingress_slot);
}

static __always_inline int open_flow(struct __sk_buff *skb) {
    struct flow *flow = policy_flow();
    if (!flow)
        return drop(COUNT_DROP_INTERNAL);
    switch (flow->hook) {
    case HOOK_FROM_POD:
        return flow_from_pod(skb, flow);
    case HOOK_TO_POD:
        return flow_to_pod(skb, flow);
    case HOOK_FROM_NET:
        return flow_from_net(skb, flow);
    case HOOK_FROM_TUNNEL:
        return flow_from_tunnel(skb, flow);
    default:
        return drop(COUNT_DROP_INTERNAL);
    }
}
