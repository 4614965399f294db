/* The least that a server of PyTorch's TCPStore could do: it waits with epoll, reads, and writes a reply of the right length, for the
 * few requests that are measured. It keeps nothing and checks nothing. What it takes is what three system calls and TCP on loopback
 * take: no server that is built in this way can take less. Prints its port. */

#define _GNU_SOURCE
#include <arpa/inet.h>
#include <netinet/tcp.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/socket.h>
#include <unistd.h>

static char in[1 << 20], out[1 << 20];

static char *number(char *at, uint64_t *value) {
    memcpy(value, at, sizeof *value);
    return at + sizeof *value;
}

static char *text(char *at) {
    uint64_t length;
    at = number(at, &length);
    return at + length;
}

static size_t put(size_t at, uint64_t value) {
    memcpy(out + at, &value, sizeof value);
    return at + sizeof value;
}

/* Requests come whole: clients on loopback send each at once, and wait for its reply. */
static size_t answer(char *at, char *end) {
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
            length = put(length, 64) + 64;
            break;
        case 4: /* add */
            at = text(at) + 8;
            length = put(length, 1);
            break;
        case 5: /* check */
        case 6: /* wait */
            for (at = number(at, &count); count > 0; count--) at = text(at);
            out[length++] = 0;
            break;
        case 7: /* number of keys */
            length = put(length, 0);
            break;
        case 8: /* delete */
            at = text(at);
            length = put(length, 0);
            break;
        default:
            fprintf(stderr, "floor: the operation %d is not measured\n", operation);
            exit(1);
        }
    }
    return length;
}

int main(void) {
    struct sockaddr_in address = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
    socklen_t size = sizeof address;
    int listener = socket(AF_INET, SOCK_STREAM | SOCK_NONBLOCK, 0), yes = 1, poll = epoll_create1(0);
    if (bind(listener, (void *)&address, size) || listen(listener, 128)) return perror("floor"), 1;
    getsockname(listener, (void *)&address, &size);
    printf("%d\n", ntohs(address.sin_port));
    fflush(stdout);
    struct epoll_event event = {.events = EPOLLIN, .data.fd = listener}, events[64];
    epoll_ctl(poll, EPOLL_CTL_ADD, listener, &event);
    for (;;) {
        int ready = epoll_wait(poll, events, 64, -1);
        for (int i = 0; i < ready; i++) {
            int client = events[i].data.fd;
            if (client == listener) {
                client = accept4(listener, NULL, NULL, SOCK_NONBLOCK);
                setsockopt(client, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
                event = (struct epoll_event){.events = EPOLLIN | EPOLLET, .data.fd = client};
                epoll_ctl(poll, EPOLL_CTL_ADD, client, &event);
                continue;
            }
            ssize_t got = read(client, in, sizeof in);
            size_t length = got > 0 ? answer(in, in + got) : 0;
            if (got <= 0 || (length > 0 && write(client, out, length) != (ssize_t)length)) close(client);
        }
    }
}
