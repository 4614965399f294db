/* The least that a server of PyTorch's TCPStore could do: it waits, reads, and writes a reply of the right length, for the few requests
 * that are measured. It keeps nothing and checks nothing. What it takes is what the system calls and TCP on loopback take: no server
 * that is built in this way can take less. Prints its port.
 *
 * Started as `floor [HOW]`; if the system does not let it, it prints no port, and says why.
 *
 * epoll    epoll_wait, read, write.
 * uring    io_uring with all that is meant to make it quick: receives that are armed once and fill buffers of a shared ring, registered
 *          sockets, replies that say nothing if they succeed, one system call that sends all replies and waits for the next requests.
 * sqpoll   the same, with a kernel thread that looks for replies to send. It does so without a pause while there is traffic. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <errno.h>
#include <linux/io_uring.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <unistd.h>

static char in[1 << 20];

static char *number(char *at, uint64_t *value) {
    memcpy(value, at, sizeof *value);
    return at + sizeof *value;
}

static char *text(char *at) {
    uint64_t length;
    at = number(at, &length);
    return at + length;
}

static size_t put(char *out, size_t at, uint64_t value) {
    memcpy(out + at, &value, sizeof value);
    return at + sizeof value;
}

/* Requests come whole: clients on loopback send each at once, and wait for its reply. */
static size_t answer(char *at, char *end, char *out) {
    uint64_t count;
    size_t length = 0;
    while (at < end) {
        int operation = *at++;
        switch (operation) {
        case 0: /* validate */
            at += 4;
            break;
        case 13: /* ping */
            memcpy(out + length, at, 4);
            at += 4, length += 4;
            break;
        case 1: /* set */
            at = text(text(at));
            break;
        case 3: /* get */
            at = text(at);
            length = put(out, length, 64) + 64;
            break;
        case 4: /* add */
            at = text(at) + 8;
            length = put(out, length, 1);
            break;
        case 5: /* check */
        case 6: /* wait */
            for (at = number(at, &count); count > 0; count--) at = text(at);
            out[length++] = 0;
            break;
        case 7: /* number of keys */
            length = put(out, length, 0);
            break;
        case 8: /* delete */
            at = text(at);
            length = put(out, length, 0);
            break;
        default:
            fprintf(stderr, "floor: the operation %d is not measured\n", operation);
            exit(1);
        }
    }
    return length;
}

static void with_epoll(int listener) {
    static char out[1 << 20];
    int poll = epoll_create1(0);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[64];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            int client = events[i].data.fd;
            if (client == listener) {
                client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.fd = client};
                epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
                continue;
            }
            ssize_t got = read(client, in, sizeof in);
            size_t length = got > 0 ? answer(in, in + got, out) : 0;
            if (got <= 0 || (length > 0 && write(client, out, length) != (ssize_t)length)) close(client);
        }
    }
}

/* io_uring, without a library. */

enum { ENTRIES = 256, CLIENTS = 256, BUFFERS = 64, BUFFER = 1 << 16, REPLY = 1 << 14 };
enum kind { ACCEPT, RECEIVE, SEND, CLOSE };

static int ring;
static unsigned *sq_head, *sq_tail, *sq_flags, *cq_head, *cq_tail, sq_mask, cq_mask, prepared;
static struct io_uring_sqe *sqes;
static struct io_uring_cqe *cqes;
static struct io_uring_buf_ring *buffers;
static char received[BUFFERS][BUFFER], replies[CLIENTS][REPLY];

static void check(long result, const char *what) {
    if (result >= 0) return;
    fprintf(stderr, "floor: %s: %s\n", what, strerror(errno));
    exit(1);
}

static long control(unsigned operation, void *what, unsigned count) {
    return syscall(__NR_io_uring_register, ring, operation, what, count);
}

static void set_up(unsigned flags) {
    struct io_uring_params parameters = {.flags = flags, .sq_thread_idle = 100};
    check(ring = syscall(__NR_io_uring_setup, ENTRIES, &parameters), "io_uring_setup");
    size_t sq = parameters.sq_off.array + ENTRIES * sizeof(unsigned);
    size_t cq = parameters.cq_off.cqes + parameters.cq_entries * sizeof(struct io_uring_cqe);
    int protection = PROT_READ | PROT_WRITE, how = MAP_SHARED | MAP_POPULATE;
    char *rings = mmap(NULL, sq > cq ? sq : cq, protection, how, ring, IORING_OFF_SQ_RING);
    sqes = mmap(NULL, ENTRIES * sizeof *sqes, protection, how, ring, IORING_OFF_SQES);
    check(rings == MAP_FAILED || sqes == MAP_FAILED ? -1 : 0, "mmap");
    sq_head = (void *)(rings + parameters.sq_off.head), sq_tail = (void *)(rings + parameters.sq_off.tail);
    sq_flags = (void *)(rings + parameters.sq_off.flags), sq_mask = ENTRIES - 1;
    cq_head = (void *)(rings + parameters.cq_off.head), cq_tail = (void *)(rings + parameters.cq_off.tail);
    cqes = (void *)(rings + parameters.cq_off.cqes), cq_mask = parameters.cq_entries - 1;
    unsigned *array = (void *)(rings + parameters.sq_off.array);
    for (unsigned i = 0; i < ENTRIES; i++) array[i] = i;

    buffers = mmap(NULL, BUFFERS * sizeof(struct io_uring_buf), protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_POPULATE, -1, 0);
    struct io_uring_buf_reg given = {.ring_addr = (uintptr_t)buffers, .ring_entries = BUFFERS};
    check(control(IORING_REGISTER_PBUF_RING, &given, 1), "a ring of buffers");
    struct io_uring_rsrc_register sockets = {.nr = CLIENTS, .flags = IORING_RSRC_REGISTER_SPARSE};
    check(control(IORING_REGISTER_FILES2, &sockets, sizeof sockets), "registered sockets");
}

/* The kernel sees it when the tail is moved, in `submit`. */
static struct io_uring_sqe *prepare(enum kind kind, unsigned client, int operation) {
    if (prepared - __atomic_load_n(sq_head, __ATOMIC_ACQUIRE) == ENTRIES) check((errno = ENOSPC, -1), "the ring");
    struct io_uring_sqe *sqe = &sqes[prepared++ & sq_mask];
    *sqe = (struct io_uring_sqe){.opcode = operation, .fd = client, .user_data = (uint64_t)kind << 32 | client};
    if (kind != ACCEPT) sqe->flags = IOSQE_FIXED_FILE;
    return sqe;
}

static void give_buffer(unsigned number) {
    struct io_uring_buf *buffer = &buffers->bufs[buffers->tail & (BUFFERS - 1)];
    buffer->addr = (uintptr_t)received[number], buffer->len = BUFFER, buffer->bid = number;
    __atomic_store_n(&buffers->tail, buffers->tail + 1, __ATOMIC_RELEASE);
}

static void accept_clients(int listener) {
    struct io_uring_sqe *sqe = prepare(ACCEPT, listener, IORING_OP_ACCEPT);
    sqe->ioprio = IORING_ACCEPT_MULTISHOT, sqe->file_index = IORING_FILE_INDEX_ALLOC;
}

static void receive(unsigned client) {
    struct io_uring_sqe *sqe = prepare(RECEIVE, client, IORING_OP_RECV);
    sqe->ioprio = IORING_RECV_MULTISHOT, sqe->flags |= IOSQE_BUFFER_SELECT;
}

static void send_reply(unsigned client, size_t length) {
    struct io_uring_sqe *sqe = prepare(SEND, client, IORING_OP_SEND);
    sqe->addr = (uintptr_t)replies[client], sqe->len = length, sqe->msg_flags = MSG_WAITALL | MSG_NOSIGNAL;
    sqe->flags |= IOSQE_CQE_SKIP_SUCCESS;
}

static void end(unsigned client) {
    struct io_uring_sqe *sqe = prepare(CLOSE, 0, IORING_OP_CLOSE);
    sqe->flags = 0, sqe->file_index = client + 1;
}

static void submit(unsigned setup) {
    unsigned new = prepared - *sq_tail, flags = IORING_ENTER_GETEVENTS;
    __atomic_store_n(sq_tail, prepared, __ATOMIC_SEQ_CST);
    if (setup & IORING_SETUP_SQPOLL && __atomic_load_n(sq_flags, __ATOMIC_SEQ_CST) & IORING_SQ_NEED_WAKEUP) flags |= IORING_ENTER_SQ_WAKEUP;
    long done = syscall(__NR_io_uring_enter, ring, new, 1, flags, NULL, 0);
    if (done < 0 && errno != EINTR) check(done, "io_uring_enter");
}

static void with_uring(int listener, unsigned setup) {
    for (unsigned i = 0; i < BUFFERS; i++) give_buffer(i);
    accept_clients(listener);
    for (;;) {
        submit(setup);
        unsigned head = *cq_head, tail = __atomic_load_n(cq_tail, __ATOMIC_ACQUIRE);
        for (; head != tail; head++) {
            struct io_uring_cqe *cqe = &cqes[head & cq_mask];
            unsigned client = (unsigned)cqe->user_data, is_armed = cqe->flags & IORING_CQE_F_MORE;
            switch ((enum kind)(cqe->user_data >> 32)) {
            case ACCEPT:
                if (cqe->res >= 0) receive(cqe->res);
                if (!is_armed) accept_clients(listener);
                break;
            case RECEIVE:
                if (cqe->res > 0) {
                    unsigned number = cqe->flags >> IORING_CQE_BUFFER_SHIFT;
                    size_t length = answer(received[number], received[number] + cqe->res, replies[client]);
                    give_buffer(number);
                    if (length > 0) send_reply(client, length);
                }
                if (!is_armed) {
                    if (cqe->res > 0 || cqe->res == -ENOBUFS) receive(client);
                    else end(client);
                }
                break;
            case SEND: /* it has failed, and so will the next receive */
            case CLOSE:
                break;
            }
        }
        __atomic_store_n(cq_head, head, __ATOMIC_RELEASE);
    }
}

int main(int count, char **arguments) {
    const char *how = count > 1 ? arguments[1] : "epoll";
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), yes = 1;
    /* Its clients' sockets inherit it. */
    setsockopt(listener, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
    if (bind(listener, (void *)&address, size) || listen(listener, 128)) return perror("floor"), 1;
    unsigned setup = 0;
    if (!strcmp(how, "uring")) setup = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_DEFER_TASKRUN;
    if (!strcmp(how, "sqpoll")) setup = IORING_SETUP_SINGLE_ISSUER | IORING_SETUP_SQPOLL;
    if (setup) set_up(setup);
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    if (setup) with_uring(listener, setup);
    else with_epoll(listener);
}
