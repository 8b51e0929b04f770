// SPDX-License-Identifier: GPL-2.0-only OR Apache-2.0
// For benchmarks: the least that any connection tracking does, one LRU lookup and one counter.
#include <uapi/linux/pkt_cls.h>

struct floor_key {
    __u32 w[4];
};
struct floor_value {
    __u64 w[11];
};
BPF_TABLE("lru_hash", struct floor_key, struct floor_value, floor_flows, 1);
BPF_TABLE("percpu_array", u32, u64, floor_counter, 1);

int floor_program(struct __sk_buff *skb)
{
    struct floor_key key = {.w = {1, 2, 3, 4}};
    __u32 zero = 0;
    struct floor_value *value = floor_flows.lookup(&key);
    __u64 *packets = floor_counter.lookup(&zero);
    if (value && packets)
        *packets += 1;
    return TC_ACT_OK;
}
