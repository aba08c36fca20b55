/* Stands in for pyxis: takes the options it adds to srun and appends them to the file that plugstack.conf names. */
#include <slurm/spank.h>
#include <stdio.h>

SPANK_PLUGIN(container_stub, 1)

static const char *record_path;
static char *names[] = {"container-image", "container-mounts", "container-workdir", "container-name",
                        "container-env", "no-container-mount-home", "container-mount-home",
                        "container-writable", "container-remap-root", "no-container-remap-root"};
#define NUM_NAMES (int)(sizeof(names) / sizeof(names[0]))
#define FIRST_FLAG 5

static int record(int option, const char *value, int remote)
{
    if (remote)
        return ESPANK_SUCCESS;
    FILE *file = fopen(record_path, "a");
    if (!file)
        return ESPANK_ERROR;
    fprintf(file, "%s=%s\n", names[option], value ? value : "");
    fclose(file);
    return ESPANK_SUCCESS;
}

int slurm_spank_init(spank_t spank, int argc, char **argv)
{
    if (argc != 1)
        return ESPANK_ERROR;
    record_path = argv[0];
    for (int i = 0; i < NUM_NAMES; i++) {
        int has_value = i < FIRST_FLAG;
        struct spank_option option = {names[i], has_value ? "VALUE" : NULL, "recorded", has_value, i, record};
        if (spank_option_register(spank, &option) != ESPANK_SUCCESS)
            return ESPANK_ERROR;
    }
    return ESPANK_SUCCESS;
}
