// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// From a service's address to one backend. Used per packet (tc) and per socket (cgroup).

static __always_inline struct frontend *frontend_of(const addr_t *dst, __be16 port, __u8 proto) {
    struct frontend_key key = {.addr = *dst, .port = port, .proto = proto};
    return frontends.lookup(&key);
}

// A NodePort: the caller knows that the packet is for a node's own address.
static __always_inline struct frontend *frontend_of_node(__be16 port, __u8 proto) {
    struct frontend_key key = {.port = port, .proto = proto};
    return frontends.lookup(&key);
}

// A NodePort by another node's address.
static __always_inline struct frontend *frontend_of_other_node(const addr_t *dst, __be16 port,
                                                               __u8 proto) {
    struct node_key node;
    addr_to_node(dst, &node);
    __u32 *known = nodes.lookup(&node);
    return known && *known & NODE_PORTS ? frontend_of_node(port, proto) : NULL;
}

// The same for pods and processes of this node: they go to the backend from here, that node would
// choose among the same ones. Not where it would choose its own alone (externalTrafficPolicy).
static __always_inline struct frontend *shared_node_port(const addr_t *dst, __be16 port,
                                                         __u8 proto) {
    struct frontend *frontend = frontend_of_other_node(dst, port, proto);
    return frontend && !(frontend->flags & FRONTEND_EXTERNAL_LOCAL) ? frontend : NULL;
}

// An address that ClusterIPs are allocated from; the caller knows that no service has it.
static __always_inline int in_service_range(const addr_t *a) {
    struct cidr_key key = {.prefixlen = ADDR_BITS, .addr = *a};
    return service_ranges.lookup(&key) != NULL;
}

// loadBalancerSourceRanges: only clients within one of the ranges.
static __always_inline int client_allowed(const struct frontend *frontend, const addr_t *client) {
    if (!(frontend->flags & FRONTEND_SOURCE_RANGES))
        return 1;
    struct source_range_key key = {
        .prefixlen = 32 + ADDR_BITS, .service = frontend->service, .addr = *client};
    return source_ranges.lookup(&key) != NULL;
}

// The client's last backend, while it is in the list and the timeout has not passed.
static __always_inline struct backend *affine_backend(const struct frontend *frontend, __u32 list,
                                                      const struct affinity_key *key, __u64 now,
                                                      __u32 *id) {
    struct affinity *last = affinity.lookup((struct affinity_key *)key);
    if (!last || now - last->last_seen > frontend->affinity_seconds * SECOND)
        return NULL;
    struct member_key member = {.list = list, .backend = last->backend};
    if (!members.lookup(&member))
        return NULL;
    *id = last->backend;
    return backends.lookup(id);
}

// Every bit of the word reaches the hash's low byte (the constants are MurmurHash3's).
static __always_inline __u32 mix(__u32 hash, __u32 word) {
    hash = (hash ^ word) * 0x85ebca6b;
    hash = (hash ^ hash >> 13) * 0xc2b2ae35;
    return hash ^ hash >> 16;
}

// What a flow's choice is made by. With Maglev all nodes choose alike: by the flow, or with
// affinity by the client alone. `ports`: source and destination; 0 where they are not known yet,
// for a socket that connects.
static __always_inline __u32 choice_hash(const struct frontend *frontend, const addr_t *client,
                                         const addr_t *service, __u32 ports) {
    struct settings *node = node_settings();
    if (!ports || !node || !(node->flags & SETTINGS_MAGLEV))
        return bpf_get_prandom_u32();
    __u32 hash = 1;
    for (int i = 0; i < ADDR_WORDS; i++)
        hash = mix(hash, client->w[i]);
    if (frontend->affinity_seconds)
        return hash;
    for (int i = 0; i < ADDR_WORDS; i++)
        hash = mix(hash, service->w[i]);
    return mix(hash, ports);
}

static __always_inline __u32 slot_of(__u32 list, __u32 size, __u32 hash) {
    struct list_key key = {.list = list};
    struct settings *node = node_settings();
    if (node && node->flags & SETTINGS_MAGLEV) {
        struct maglev_table *table = maglev.lookup(&key);
        if (table)
            return table->slots[hash & (MAGLEV_SIZE - 1)];
    }
    return hash % size;
}

// One backend of a list with `size` slots. A slot can be missing while the list shrinks: the first
// one is missing last.
static __always_inline struct backend *listed_backend(__u32 list, __u32 size, __u32 hash,
                                                      __u32 *id) {
    struct slot_key slot = {.list = list};
    slot.slot = slot_of(list, size, hash);
    __u32 *found = slots.lookup(&slot);
    if (!found) {
        slot.slot = 0;
        found = slots.lookup(&slot);
    }
    if (!found)
        return NULL;
    *id = *found;
    return backends.lookup(id);
}

static __always_inline struct backend *choose_backend(const struct frontend *frontend, __u32 kind,
                                                      const addr_t *client, __u32 hash, __u32 *id) {
    __u32 size = kind == LIST_LOCAL ? frontend->local_count : frontend->cluster_count;
    __u32 list = frontend->service * 2 + kind;
    struct backend *backend = NULL;
    if (!size)
        return NULL;
    if (!frontend->affinity_seconds)
        return listed_backend(list, size, hash, id);

    struct affinity_key key = {.client = *client, .service = frontend->service};
    __u64 now = bpf_ktime_get_coarse_ns();
    backend = affine_backend(frontend, list, &key, now, id);
    if (!backend)
        backend = listed_backend(list, size, hash, id);
    if (backend) {
        struct affinity seen = {.last_seen = now, .backend = *id};
        affinity.update(&key, &seen);
    }
    return backend;
}
